"""The configs that come with the package, by their names."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Returns the path of each config file by its name: in an installed package, else in the clone beside it."""
    inside = _PACKAGE / "configs"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def path_of(config: str) -> str:
    """Returns the path of a config file: `config`, or that of a shipped one where it is its name or `configs/NAME.py`.

    A file that is there comes first.
    """
    names = {form: path for name, path in shipped().items() for form in (name, f"configs/{name}.py")}
    return config if Path(config).is_file() else str(names.get(config, config))
