from importlib.metadata import version

from trl_anytime.outside.versions import installed_version, installed_versions


def test_versions_by_either_name():
    """PyYAML is imported as `yaml`."""
    assert installed_version("yaml") == installed_version("PyYAML") == version("PyYAML")
    assert installed_versions(["torch", "no_such_package"]) == {"torch": version("torch")}
