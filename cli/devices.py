"""Devices: what there is, what is known of one, and measure this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mopt.cli._command import Group, option
from mopt.cli._output import Column, Output
from mopt.cli._text import plural, seconds, three_digits
from mopt.device import DeviceProfile, find_device, list_devices

if TYPE_CHECKING:
    from mopt.device_calibration import Calibration
    from mopt.quantity import Quantity


@click.group(cls=Group, help=__doc__)
def command() -> None:
    pass


@command.command("list")
@click.pass_obj
def list_command(out: Output) -> None:
    """Every device by name; use one with `mopt compile -t NAME`, `inspect` or `plan`."""
    profiles = [find_device("host"), *list_devices()]
    if out.as_json:
        out.document({"devices": [_listing(one) for one in profiles]})
        return
    out.table(
        [Column("device"), Column("kind"), Column("fp32", True), Column("int8", True),
         Column("memory", True), Column("bandwidth", True), Column("")],
        [
            [one.id, one.kind, _rate(one, "fp32"), _rate(one, "int8"),
             str(_main_memory(one).capacity), str(_main_memory(one).bandwidth), _about(one)]
            for one in profiles
        ],
    )  # fmt: skip


@command.command("show")
@click.argument("name")
@click.option("--toml", is_flag=True, help="Print the profile as TOML, to be changed and used.")
@click.pass_obj
def show_command(out: Output, name: str, toml: bool) -> None:
    """What is known of a device, and where each number comes from. NAME may be a profile's path."""
    profile = find_device(name)
    if toml:
        from mopt.device_text import device_toml

        out.text(device_toml(profile).rstrip("\n"))
        return
    if out.as_json:
        out.document(_listing(profile) | _details(profile))
        return
    out.text(f"{profile.id}  ({profile.kind})  {profile.name}", bold=True)
    out.text(profile.summary)
    out.text()
    out.table(
        [Column("part"), Column("number"), Column("value", True), Column("source"),
         Column("as of")],
        [
            [part, number, str(quantity), _source(profile, quantity),
             profile.source_of(quantity).date]
            for part, number, quantity in _numbers(profile)
        ],
    )  # fmt: skip
    out.text()
    for source in profile.sources.values():
        out.text(f"{source.name}: {source.kind}, {source.title}")
    if profile.calibration is not None:
        out.text()
        _show_calibration(out, profile.calibration)


@command.command("calibrate")
@click.option(
    "-o", "--output", metavar="FILE.toml",
    help="Write the profile to FILE.toml; default: keep it for the target `host`.",
)  # fmt: skip
@option(
    "--seconds", "budget", type=click.FloatRange(5, 3600), default=240.0, show_default=True,
    help="About how long to measure.",
)  # fmt: skip
@option(
    "--threads", type=click.IntRange(1, 4096),
    help="Threads that models will run with; default: what the runtime picks.",
)  # fmt: skip
@click.pass_obj
def calibrate_command(out: Output, output: str | None, budget: float, threads: int | None) -> None:
    """Measure this machine through ONNX Runtime and fit the cost model to it.

    Single operators of many sizes and formats are timed in rounds; timings that other work on the
    machine disturbed are taken again. Best on a quiet machine.
    """
    from mopt.cli._progress import ConsoleProgress
    from mopt.device import calibrate_host, keep_host_profile
    from mopt.device_text import device_toml
    from mopt.errors import UsageError
    from mopt.files import write_file_atomic

    if output is not None and not output.endswith(".toml"):
        raise UsageError(
            f"a profile is a .toml file, not {output!r}", code="profile-name",
            hint="mopt devices calibrate -o machine.toml",
        )  # fmt: skip
    with ConsoleProgress(out) as progress:
        progress.stage("Calibrating")
        profile = calibrate_host(budget, threads=threads, progress=progress)
        found = profile.calibration
        assert found is not None
        progress.end(f"{plural(sum(len(fit.points) for fit in found.fits), 'operator')} measured")
    if output is not None:
        write_file_atomic(output, device_toml(profile).encode())
        kept = output
    else:
        kept = "the target host" if threads is None else ""
        if kept:
            keep_host_profile(profile)
    if out.as_json:
        out.document({"profile": output, **_calibration(found)})
        return
    _show_calibration(out, found)
    out.text()
    if not kept:
        out.warn("not kept: the target host runs with the runtime's own number of threads; use -o")
    else:
        out.text(f"Kept for {kept}" if output is None else f"Wrote {kept}")


# ---- a profile in words


def _rate(profile: DeviceProfile, number_format: str) -> str:
    rate = profile.peak(number_format)
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if rate >= size:
            return f"{three_digits(rate / size)} {unit}op/s"
    return "-"


def _main_memory(profile: DeviceProfile) -> Any:
    return profile.tier(profile.processors[0].memory)


def _about(profile: DeviceProfile) -> str:
    if not profile.is_host:
        return profile.summary
    if profile.calibration is None:
        return f"this machine, not measured: {profile.name}; mopt devices calibrate"
    return f"this machine, measured {profile.calibration.date}"


def _source(profile: DeviceProfile, quantity: Quantity) -> str:
    source = profile.source_of(quantity)
    return source.name if source.kind == source.name else f"{source.name} ({source.kind})"


def _numbers(profile: DeviceProfile) -> list[tuple[str, str, Quantity]]:
    found = []
    for processor in profile.processors:
        for key, rate in processor.peak.items():
            found.append((processor.name, f"rate {key}", rate))
        for key, energy in processor.energy.items():
            found.append((processor.name, f"energy {key}", energy))
        found.append((processor.name, "launch", processor.launch))
        if processor.units is not None:
            found.append((processor.name, "units", processor.units))
        if processor.most_rows is not None:
            found.append((processor.name, "most rows", processor.most_rows))
    parts: list[tuple[str, object]] = [(tier.name, tier) for tier in profile.memory]
    parts += [(f"{link.start} to {link.end}", link) for link in profile.links]
    for name, owner in parts:
        for field in ("capacity", "bandwidth", "latency", "energy"):
            quantity = getattr(owner, field, None)
            if quantity is not None:
                found.append((name, field, quantity))
    found.extend(("power", key, quantity) for key, quantity in profile.power.items())
    if profile.sustained is not None:
        found.append(("", "sustained share", profile.sustained))
    return found


def _listing(profile: DeviceProfile) -> dict[str, Any]:
    memory = _main_memory(profile)
    formats = {key for processor in profile.processors for key in processor.peak}
    return {
        "id": profile.id,
        "name": profile.name,
        "kind": profile.kind,
        "summary": profile.summary,
        "aliases": list(profile.aliases),
        "backends": list(profile.backends),
        "ops_per_second": {key: profile.peak(key) for key in sorted(formats)},
        "memory_bytes": memory.capacity.basic,
        "bytes_per_second": memory.bandwidth.basic,
        "is_host": profile.is_host,
        "is_measured": profile.calibration is not None,
    }


def _details(profile: DeviceProfile) -> dict[str, Any]:
    numbers = [
        {
            "part": part, "number": number, "value": quantity.value, "unit": quantity.unit,
            "source": quantity.source,
        }
        for part, number, quantity in _numbers(profile)
    ]  # fmt: skip
    sources = {
        one.name: {"kind": one.kind, "title": one.title, "date": one.date}
        for one in profile.sources.values()
    }
    calibration = profile.calibration
    return {
        "numbers": numbers,
        "sources": sources,
        "calibration": _calibration(calibration) if calibration is not None else None,
    }


def _calibration(found: Calibration) -> dict[str, Any]:
    return {
        "date": found.date,
        "runtime": found.runtime,
        "seconds": found.seconds,
        "load": found.load,
        "disturbed": found.disturbed,
        "quiet": found.quiet,
        "median_error": found.median_error,
        "error_90": found.error_90,
        "families": [
            {
                "family": fit.family,
                "operators": len(fit.points),
                "median_error": None if fit.median_error != fit.median_error else fit.median_error,
                "error_90": None if fit.error_90 != fit.error_90 else fit.error_90,
            }
            for fit in found.fits
        ],
    }


def _show_calibration(out: Output, found: Calibration) -> None:
    out.text(
        f"Measured {found.date} with {found.runtime} in {seconds(found.seconds)} at a load of "
        f"{found.load:.1f}: {found.disturbed:.0%} of the timings were disturbed"
    )
    out.text(
        f"Operators left out of the fit are off by {100 * found.median_error:.1f} % in the median, "
        f"90 % of them by less than {100 * found.error_90:.0f} %"
    )
    out.text()
    out.table(
        [Column("operators"), Column("measured", True), Column("median error", True),
         Column("90 % within", True)],
        [
            [fit.family, str(len(fit.points)), _percent(fit.median_error), _percent(fit.error_90)]
            for fit in found.fits
        ],
    )  # fmt: skip


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f} %"
