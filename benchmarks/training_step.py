"""What does a supervised step cost, beside the layer passes that it needs?

For developers who change the training; docs/log.md has the numbers. Models of `make smollm2`:

    python benchmarks/training_step.py --plain runs/smollm2/base --looped runs/smollm2/recast

In turn, on the same rows: forward and backward of the plain model; its layers alone, forward
without gradient and forward with backward; and the supervised steps of the looped model. `expected`
is the time of the layer and head passes that these steps take by their definition, at the plain
model's speed; `ratio` is what they took, divided by that. Times are CPU seconds of one thread, so
that others at work on the machine hardly change them. `--only` gives the peak memory.
"""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.training.objective import Counts, Labelled
from vllm_loopus.training.settings import Supervision
from vllm_loopus.training.supervision import Carried, TrainableLoopUS, supervised_step
from vllm_loopus.training.vocabulary import plain_scores


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--plain", required=True, help="the base model")
    parser.add_argument("--looped", required=True, help="a LoopUS model that was cut from it")
    parser.add_argument("--rows", type=int, default=2, help="packed sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--steps", default="1,3", help="supervised steps, counted from 0")
    parser.add_argument("--update", choices=("step", "batch"), default="step")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("plain", "looped"), help="for the peak memory of one")
    options = parser.parse_args()
    report = begin()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = [int(step) for step in options.steps.split(",")]
    plain: Any = AutoModelForCausalLM.from_pretrained(options.plain, dtype=torch.float32).train()
    looped = TrainableLoopUS.from_pretrained(options.looped, dtype=torch.float32).train()
    looped.encoder.requires_grad_(False)
    if options.checkpointing:
        for model in (plain, looped):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, plain.config.vocab_size, (options.rows, options.length))
    positions = torch.arange(options.length).repeat(options.rows, 1)
    labelled = Labelled.of(ids, positions)
    counts = Counts(len(labelled), labelled.documents)
    supervision = Supervision(
        n_supervision=len(steps), n_reasoning_steps=max(steps) + 1, update=options.update
    )
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bf16")

    def plain_step() -> torch.Tensor:
        with bf16:
            losses = plain_losses(plain, ids, positions, labelled)
        losses.mean().backward()
        return losses

    def looped_steps() -> list[float]:
        carried = Carried(labelled)
        found = []
        for step in steps:
            with bf16:
                result = supervised_step(looped, ids, positions, carried, step, supervision, counts)
            result["loss"].backward()
            found.append(float(result["loss"].detach()))
        return found

    tasks: dict[str, Callable[[], Any]] = {"plain": plain_step, "looped": looped_steps}
    if options.only:
        tasks[options.only]()
        losses = tasks[options.only]()
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        found = losses if isinstance(losses, list) else [float(losses.mean())]
        print(f"peak {peak} MiB")
        print(f"losses {found}")
        finish({**report, "peak_mib": peak, "losses": found}, options.write)
        return
    layers = plain.model.layers
    count = len(layers)
    embedded = plain.model.embed_tokens(ids).detach().requires_grad_()

    def run_layers(state: torch.Tensor) -> torch.Tensor:
        tables = plain.model.rotary_emb(state, positions)
        with bf16:
            for layer in layers:
                state = layer(state, position_embeddings=tables, position_ids=positions)
        return state

    def layers_forward() -> None:
        with torch.no_grad():
            run_layers(embedded)

    def layers_both() -> None:
        run_layers(embedded).float().mean().backward()

    tasks |= {"layers, forward": layers_forward, "layers, both": layers_both}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(options.rounds + 1):
        for name, task in tasks.items():
            for model in (plain, looped):
                model.zero_grad(set_to_none=False)
            began = time.process_time()
            task()
            if round_:  # the first one warms up
                seconds[name].append(time.process_time() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    forward, both = median["layers, forward"] / count, median["layers, both"] / count
    head = median["plain"] - median["layers, both"]  # forward and backward
    parts = {
        name: len(getattr(looped, name).layers) for name in ("encoder", "reasoning", "decoder")
    }
    forwards, boths, heads, done, decoded = parts["encoder"], 0, 0.0, 0, False
    for step in steps:
        forwards += (step - done) * parts["reasoning"]
        if not (decoded and step == done and options.update == "batch"):
            forwards += parts["decoder"]  # the loss before the step, for L_Mono
            heads += 1 / 3
        boths += parts["reasoning"] + parts["decoder"]
        heads += 1
        done, decoded = step + 1, True
    expected = forwards * forward + boths * both + heads * head
    tokens = options.rows * options.length
    for name, value in median.items():
        print(f"{name:16} {value:7.3f} s  {tokens / value:8.0f} tokens/s")
    print(f"passes           {forwards} layer forwards, {boths} with backward, {heads:.2f} heads")
    ratio = median["looped"] / expected
    print(f"expected         {expected:7.3f} s   ratio {ratio:.3f}")
    finish({**report, "seconds": median, "expected": expected, "ratio": ratio}, options.write)


def plain_losses(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, labelled: Labelled
) -> torch.Tensor:
    """Token losses [n], as the control is trained."""
    with plain_scores(model, labelled) as scores:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert scores is not None
    return scores.losses


if __name__ == "__main__":
    main()
