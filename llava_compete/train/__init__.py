"""Training stages.

peft imports bitsandbytes where it is installed, and the Trainer imports peft: a second of every process. Only quantised
weights need it, and their loading imports it.
"""

from llava_compete.optional_packages import not_installed

with not_installed("bitsandbytes"):
    import peft.helpers  # noqa: F401
