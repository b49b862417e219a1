"""Reinforcement learning across two pools."""

from isthmus.stages.steps.rl.loop import execute as execute
