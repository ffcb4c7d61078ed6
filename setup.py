"""Packages of the wheel: those of kart, and `studies/` as `kart_studies`.

pyproject.toml holds everything else; it cannot say "found, and one more".
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kart", "kart.*"]), "kart_studies"],
    package_dir={"kart_studies": "studies"},
)
