"""One device group: plan -> arrays -> run -> settle."""
