"""What a person is told instead of a traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where, what was wanted and what to change."""


class Stopped(RuntimeError):
    """The run was asked to stop, has saved its state, and ends. Running the same command again goes on."""


def _flatten(value, prefix: str = "") -> dict:
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in _flatten(sub, f"{prefix}{key}.").items()}
    return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}


def difference(old: dict, new: dict) -> list[str]:
    """'key: old -> new' for everything that differs between two nested dicts."""
    old, new = _flatten(old), _flatten(new)
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k, "(absent)") != new.get(k, "(absent)"))
    return [f"{k}: {old.get(k, '(absent)')} -> {new.get(k, '(absent)')}" for k in keys]
