"""What chart libraries weigh, and the files of the one that the report carries.

python -m benchmarks.chart_libraries            the table of docs/report.md
python -m benchmarks.chart_libraries --update   writes src/mbq/report/vendor

Releases come from npm, which must be installed. A library's code made from text ("Function(...)") is what a
Content-Security-Policy forbids; the column counts where its minified files do that.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "src/mbq/report/vendor"
# What the page carries, and what is inside those files.
CARRIED = {
    "vega@6.4.0": "build/vega.min.js",
    "vega-lite@6.4.3": "build/vega-lite.min.js",
    "vega-embed@7.3.0": "build/vega-embed.min.js",
}
INSIDE = ("d3@7.9.2", "topojson-client@3.1.0", "fast-json-patch@3.1.1", "json-stringify-pretty-compact@4.0.0")
INSIDE += (
    "semver@7.8.6",
    "vega-interpreter@2.3.2",
    "vega-themes@3.0.0",
    "vega-tooltip@1.1.0",
    "vega-schema-url-parser@3.0.2",
)
COMPARED = {
    "Vega-Lite": CARRIED,
    "Plotly, all charts": {"plotly.js-strict-dist-min@4.1.1": "plotly-strict.min.js"},
    "Plotly, basic charts": {"plotly.js-basic-dist-min@4.1.1": "plotly-basic.min.js"},
    "Bokeh": {"@bokeh/bokehjs@3.10.0": "build/js/bokeh.min.js"},
    "ECharts": {"echarts@6.1.0": "dist/echarts.min.js"},
    "Observable Plot": {"d3@7.9.2": "dist/d3.min.js", "@observablehq/plot@0.6.17": "dist/plot.umd.min.js"},
    "Chart.js": {"chart.js@4.6.1": "dist/chart.umd.min.js"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the carried files and their licences")
    if parser.parse_args().update:
        update()
        return
    print("| library | kB | compressed, kB | code from text |\n|---|---:|---:|---:|")
    for name, files in COMPARED.items():
        texts = [package(release)[file] for release, file in files.items()]
        made = sum(len(re.findall(rb"\bFunction\(|\bFunction\.apply|[^\w.]eval\(", text)) for text in texts)
        sizes = sum(map(len, texts)) / 1e3, sum(len(gzip.compress(text)) for text in texts) / 1e3
        print(f"| {name} | {sizes[0]:.0f} | {sizes[1]:.0f} | {made} |")


def update() -> None:
    VENDOR.mkdir(exist_ok=True)
    licences = []
    for release, file in CARRIED.items():
        (VENDOR / Path(file).name).write_bytes(package(release)[file])
    for release in (*CARRIED, *INSIDE):
        files = package(release)
        [name] = [name for name in files if re.fullmatch(r"LICEN[CS]E(\.txt|\.md)?", name, re.IGNORECASE)][:1]
        heading = " ".join(release.rsplit("@", 1))
        licences.append(f"{heading}\n{'=' * len(heading)}\n\n{files[name].decode().strip()}\n")
    (VENDOR / "LICENSES.txt").write_text("\n\n".join(licences), encoding="utf-8")


def package(release: str) -> dict[str, bytes]:
    """The files of a release by their path."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", release, "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True, capture_output=True)
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as opened:
            members = [member for member in opened.getmembers() if member.isfile()]
            return {member.name.partition("/")[2]: opened.extractfile(member).read() for member in members}  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
