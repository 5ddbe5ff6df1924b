"""
Runs a script with vLLM as on a GPU, but on the CPU.

    python run_on_cpu.py MODE SCRIPT ARGUMENTS
"""

import runpy
import sys

from engines import use_engines_on_cpu, use_file_transport

mode, script, *arguments = sys.argv[1:]
use_file_transport() if mode == "server" else use_engines_on_cpu()
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
