"""What pyproject.toml cannot say: a wheel has a start-up file at its root.

site-packages/peregrine_transformers.pth is a line that Python runs when it starts: see the package.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STARTUP_FILE = "peregrine_transformers.pth"
STARTUP_LINE = "import peregrine_transformers; peregrine_transformers.register_later()\n"


class BuildWithStartupFile(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            (Path(self.build_lib) / STARTUP_FILE).write_text(STARTUP_LINE)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(Path(self.build_lib) / STARTUP_FILE)]
        return [*super().get_outputs(include_bytecode), *own]


setup(cmdclass={"build_py": BuildWithStartupFile})
