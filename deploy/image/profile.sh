# A login shell resets PATH; KubeRay's own commands run in one.
PATH=/opt/peregrine/bin:$PATH
