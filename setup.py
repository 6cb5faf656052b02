"""What pyproject.toml cannot say: the kernels live at the repository's top and are installed inside the package."""

from setuptools import setup

setup(
    packages=["adam_ghost", "adam_ghost.kernels"],
    package_dir={"adam_ghost.kernels": "kernels"},
)
