"""`vllm-loopus`: puts the subcommands together."""

import typer

from vllm_loopus.cli.alias import alias_app
from vllm_loopus.cli.batch import batch
from vllm_loopus.cli.bench import bench
from vllm_loopus.cli.deploy import deploy
from vllm_loopus.cli.depths import depths
from vllm_loopus.cli.doctor import doctor
from vllm_loopus.cli.eval import evaluate
from vllm_loopus.cli.info import info
from vllm_loopus.cli.recast import analyze, convert, recast
from vllm_loopus.cli.trace import trace
from vllm_loopus.cli.train import train

app = typer.Typer(
    name="vllm-loopus",
    help="Tools around LoopUS models on vLLM.",
    epilog="Exit codes: 0 done, 1 a problem was found, 2 the input is wrong.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(alias_app)
for command in (doctor, info, recast, analyze, convert, train, trace, depths, bench, batch, deploy):
    app.command()(command)
app.command("eval")(evaluate)


@app.callback()
def main() -> None:
    """Tools around LoopUS models on vLLM."""
