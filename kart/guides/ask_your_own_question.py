"""Ask your own question.

# A question is a file

A study compares arms. Each arm is a search space with the same budget; the first is the baseline.
The docstring is the question, `STUDY` says the rest, and the file is all there is:

>>> import dataclasses
>>> from kart import search
>>> from kart.train import Config
>>> def arm(spec):
...     def space(trial, config):
...         rate = trial.suggest_float("learning_rate", 3e-4, 3e-3, log=True)
...         return dataclasses.replace(config, operator=spec, learning_rate=rate)
...
...     return space
>>> STUDY = search.Study(
...     config=Config(data="digits", epochs=5, patch_size=2),
...     arms={"softmax": arm("softmax"), "G3": arm("G3B"), "control": arm("polynomial-0B")},
...     trials=24,  # of all arms together
...     seeds=3,  # of each trial, trained together
...     confirm=5,  # fresh seeds with which the best of each arm is trained again
... )

Every arm has its own learning rate: an operator compared at the rate that suits another loses by
that alone. The control ignores the scores; what is above it is due to them. A point that cannot be
trained, such as heads that do not divide the width, is pruned where it is drawn:
`raise optuna.TrialPruned("heads")`; a grid leaves it out.

# Run it

    kart study run my_question.py --out runs/my_question
    kart study run my_question.py --set epochs=10 --fix learning_rate=1e-3 --out runs/longer

Killed and started again, it goes on. Several machines share one storage: `kart study init` with
`--storage postgresql://...`, `kart study work` as often as you like. A name that does not exist is
an error that lists those near it, and so is an option without effect.

# A space without a file

`search.suggest_operator` and `search.objective` drop into an Optuna study of yours:

>>> import optuna
>>> drawn = {"family": "fourier", "grid": 3, "rank": 8, "sharing": "blockwise"}
>>> trial = optuna.trial.FixedTrial(drawn)
>>> search.suggest_operator(trial, ["fourier"], grid=(1, 9), rank=(4, 16), sharing=("blockwise",))
'G3B:rank=8'

# What the answer is worth

The search chooses on validation images, so its best result is too good. The confirmed one is of
fresh seeds, and the test split is read once, for the winner of each arm: state that number, with
its interval, and n. `kart.guides.read_the_report` says where it stands.
"""
