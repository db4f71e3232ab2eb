"""One policy per file: functions from (graph, topology, cost) to a Schedule."""
