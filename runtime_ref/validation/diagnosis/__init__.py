"""Why a check fails: known faults, tried one by one."""
