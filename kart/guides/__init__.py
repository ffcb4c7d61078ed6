"""Four ways in, each a page that is tested as it stands.

| page | for whom |
|---|---|
| `kart.guides.put_it_into_your_model` | who has a transformer and wants its attention learned |
| `kart.guides.write_a_basis_from_zero` | who has a family of functions to try |
| `kart.guides.ask_your_own_question` | who wants to compare arms fairly, on one machine or many |
| `kart.guides.read_the_report` | who has a page before them and wonders what it says |

These are modules of text: there is nothing to import. `make docs` builds them, with every public
docstring and the README below, into `build/docs`.

.. include:: ../../README.md
"""
