"""Training through a bound: ten steps, and every bit the plain model's.

models.py, library.py   small models, by hand and of transformers, each with one difficulty
cases.py                the table: a model, its inputs, how a step turns them into gradients
recipes.py              optimizers, and what people do around a step
reference.py            the loop, on the plain and on the streamed model, and their comparison
pairwise.py             rows in which every two choices meet at least once
tables.py               the choices, what cannot go together and why, and the rows
side_by_side.py         one script on a plain and on a streamed model, for the tests of one rule
gates.py                optimizers that wait for a gate: what happens before an update is certain
"""
