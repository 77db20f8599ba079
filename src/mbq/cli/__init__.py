"""The command line: parse, call, print. Heavy imports wait inside the commands, so that --help is quick."""

from mbq.cli import asking, machine, making, sharing
from mbq.cli.command import app, main, register

register(
    making.quantize_command,
    making.export_command,
    making.inspect_command,
    asking.generate_command,
    asking.evaluate_command,
    asking.compare_command,
    asking.diagnose_command,
    asking.report_command,
    making.sensitivity_command,
    sharing.card_command,
    sharing.push_command,
    machine.demo_command,
    machine.doctor_command,
    machine.families_command,
    machine.bench_command,
)

__all__ = ["app", "main"]
