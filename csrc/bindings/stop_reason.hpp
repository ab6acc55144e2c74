// What ended an answer, as Python is told.
#pragma once

#include "moeshard/generation.hpp"

const char* reason_name(moeshard::StopReason reason);
