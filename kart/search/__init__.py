"""Optuna studies of learnable attention: spaces, objective, storage, report.

    study = optuna.create_study(direction="maximize")
    study.optimize(objective(lambda trial: Config(operator=suggest_operator(trial))), n_trials=20)

| module | what it holds |
|---|---|
| `space` | a search space as a pure function of a trial; its fingerprint and its points |
| `trials` | a trial as K seeds that train together; costs, limits, repeats |
| `storage` | settings and their guard, SQLite and servers, heartbeats, samplers, pruners |
| `question` | what a file in `studies/` defines |
| `designs` | what several studies share |
| `work` | set-up, the loop of a worker, confirmation of the winners |
| `report`, `plots` | the HTML page and the CSV; its figures |
"""

try:
    import optuna as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        '`kart.search` needs Optuna, got none. Run `pip install "kart-attention[studies]"`.'
    ) from error

from kart.search.designs import SMALL_CIFAR, compare, rate_only
from kart.search.question import TINY, Arm, Study
from kart.search.space import fixed, suggest_operator, suggest_rates
from kart.search.trials import OBJECTIVES, costs, objective, train_members
from kart.search.work import Candidate, Confirmed

__all__ = [
    "OBJECTIVES",
    "SMALL_CIFAR",
    "TINY",
    "Arm",
    "Candidate",
    "Confirmed",
    "Study",
    "compare",
    "costs",
    "fixed",
    "objective",
    "rate_only",
    "suggest_operator",
    "suggest_rates",
    "train_members",
]
