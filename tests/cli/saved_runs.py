"""Runs of every kind that save checkpoints, and the code that calls the command line as a program."""

from agents import Watched, agent_options, skip_unless_able, tool_tokenizer
from tiny import first_letter_reward, make_trainer, tiny_dataset, tiny_tokenizer
from vision import vision_dataset, vision_model

# Ends with an error if the command imported what it must not.
CODE = (
    "import sys; from exgrpo_trl.cli import main; code = main(sys.argv[1:]); "
    "heavy = {'torch', 'trl', 'transformers'} & set(sys.modules); "
    "sys.exit(f'imported {heavy}' if heavy else code)"
)


def options_of(kind):
    """Options of `make_trainer`, and the tokenizer."""
    if kind == "tools":
        skip_unless_able(kind)
        # So that questions are solved at times.
        return agent_options(tools=Watched().tools, learning_rate=1e-3), tool_tokenizer()
    if kind == "images":
        model, processor = vision_model("grid")
        dataset = vision_dataset(16)
        options = {"model": model, "processing_class": processor, "train_dataset": dataset, "learning_rate": 1e-3}
        return options | {"reward_funcs": first_letter_reward}, processor.tokenizer
    options = {"train_dataset": tiny_dataset(16, conversational=kind == "chat"), "processing_class": tiny_tokenizer()}
    if kind == "groups":
        options["replay_unit"] = "group"
    if kind == "ids":
        options["question_id_column"] = "uid"
    return options, options["processing_class"]


def new_trainer(folder, kind, **changes):
    options = options_of(kind)[0] | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | changes
    return make_trainer(folder, **options)
