"""What opens an account: no file that a run writes holds it."""

import re
from typing import Any


SECRETS = {"hub_token", "token", "use_auth_token", "api_key", "password", "secret"}
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def without_secrets(value: Any) -> Any:
    """A copy of a JSON-like value without the keys that hold secrets, and with Hub tokens in its texts taken out."""
    if isinstance(value, str):
        return TOKEN.sub("[removed]", value)
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if isinstance(value, dict):
        return {
            key: without_secrets(item) for key, item in value.items() if not (key in SECRETS and isinstance(item, str))
        }
    return value
