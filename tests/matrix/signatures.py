"""Print the parameters of the methods that replay wraps, as the installed TRL has them."""

import inspect
import json

from trl import GRPOTrainer

from exgrpo_trl.compatibility import HOOKS


def main() -> None:
    told = {}
    for name in HOOKS:
        method = getattr(GRPOTrainer, name, None)
        told[name] = method and [
            str(p).split(":")[0].split("=")[0].strip() for p in inspect.signature(method).parameters.values()
        ]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
