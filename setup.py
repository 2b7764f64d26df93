"""Everything about the package is in settings.ini; this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser()
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
url = f"https://github.com/{cfg['user']}/{cfg['repo']}"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    url=url,
    project_urls={"Source": url, "Site": f"https://{cfg['user']}.github.io/{cfg['repo']}/", "Issues": f"{url}/issues", "Changes": f"{url}/blob/{cfg['branch']}/CHANGELOG.md"},
    classifiers=[
        "Development Status :: 4 - Beta", "Intended Audience :: Education", "Intended Audience :: Science/Research",
        "Operating System :: OS Independent", "Framework :: Jupyter",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence", "Topic :: Education", "Typing :: Typed",
    ],
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["py.typed", "recipes/*.yaml", "data/*.yaml", "logs/*.csv", "logs/*.json", "logs/gpu/*", "static/*", "examples/*/*.*", "examples/*/snapshots/*", "examples_digits/*/*.*", "examples_digits/*/snapshots/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split()
                    for name in ("dev", "app", "onnx", "openvino", "photos", "hf")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
