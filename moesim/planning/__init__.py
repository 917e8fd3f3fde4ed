"""How many experts of each layer to hold: SwapMoE's memory planner (section 3.4, appendix A).

Offline, for one model, machine and profiling trace: profile one expert of each layer, find the
update period by a sweep, run random allocations, fit models of memory, latency and quality, search
them under limits. ``README.md`` tells what each model is and where the paper is silent.
"""
