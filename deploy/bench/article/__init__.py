"""`peregrine bench article`: the article's table, measured end to end over HTTP on one GPU.

docs/benchmarks/article/README.md says how it is run, what each figure means and what it needs.

`subjects` are the models, `workloads` the prompts, `run` the order of the parts. Each part yields flat
rows, which `results` writes as they come; `floors`, `claims` and `score` are arithmetic over them; `tables`,
`plots` and `report` show them.
"""
