"""An environment like Colab's: `python tests/colab.py FOLDER` makes one, with a Jupyter kernel named "colab" in
FOLDER/share/jupyter, and prints the path of its Python.

Its own are the packages of colab.txt (old ipywidgets, ipykernel and IPython, Colab's diffusers, transformers, peft),
a `google.colab` that is imported at start, and vader_nb from a wheel. torch and the rest come from the environment
that runs this, which stands behind it on the path; nothing of the checkout does.
"""

import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def make(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain path: packages there are found, their .pth files (an editable install) are not read.
    (packages / "behind.pth").write_text(f"{site.getsitepackages()[0]}\n")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    (packages / "zz_colab.pth").write_text("import google.colab\n")

    def pip(*arguments):
        subprocess.run(
            [python, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True
        )

    pip("wheel", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(ROOT))
    (wheel,) = (folder / "wheel").glob("*.whl")
    pip(
        "install", "-r", str(ROOT / "tests" / "colab.txt")
    )  # with what IPython 7 needs and newer ones do not
    pip("install", "--no-deps", "--ignore-installed", str(wheel))  # an editable one stands behind
    subprocess.run(
        [python, "-m", "ipykernel", "install", "--prefix", folder, "--name", "colab"], check=True
    )
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
