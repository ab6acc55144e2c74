// Ctrl-C while the GIL is released.
#pragma once

#include <pybind11/pybind11.h>

// Runs pending signal handlers. True where one raised: its exception stays set, and the MoeshardError that ends the
// computation does not replace it.
bool python_signal_pending();
