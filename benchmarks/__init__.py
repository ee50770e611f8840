"""Benchmarks of training and serving: `python -m benchmarks.NAME --help`.

| Package | Question |
|---|---|
| `quality` | How well does a prefix learn a task, compared with LoRA and stock prefix tuning? |
| `training` | How long does a training step take, and how much memory does it need? |
| `serving` | How fast is a prefix served, compared with cached text, the base model and LoRA? |
| `scheduler` | How much CPU time does a prefix cost in vLLM's front end and scheduler? |
| `cold_start` | What do startup, the first request and run-time loading cost with many adapters? |
| `gpu` | Is everything right on an NVIDIA GPU, and how fast is it there? |
| `load` | Are all answers right under load, while adapters are replaced? |

`common` holds what they share; `results` holds their results as JSON, and the plots.
"""
