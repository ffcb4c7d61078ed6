"""Four ways in, each a page that is tested as it stands, and two pages of results.

* `kart.guides.put_it_into_your_model`, for who has a transformer and wants its attention learned;
* `kart.guides.write_a_basis_from_zero`, for who has a family of functions to try;
* `kart.guides.ask_your_own_question`, for who wants to compare arms fairly;
* `kart.guides.read_the_report`, for who has a page before them and wonders what it says;
* `kart.guides.what_the_studies_found` and `kart.guides.what_it_costs`, for who wants every table.

These are modules of text: there is nothing to import. `make docs` builds them, with every public
docstring and the README below, into `build/docs`.

.. include:: ../../README.md
"""
