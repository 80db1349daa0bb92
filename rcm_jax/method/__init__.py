"""The papers: formulas, losses, rollouts, samplers. Pure functions, no state; nothing here mentions a mesh."""
