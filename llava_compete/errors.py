"""The one exception for mistakes a user can mend.

`llava-compete` prints its message as a single clear line and exits with status 2. The message names the file,
key or record, what was found and what was expected. Everything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: a config, a data record, a checkpoint directory or an environment that cannot be used."""
