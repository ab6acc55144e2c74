#include "bindings/stop_reason.hpp"

using moeshard::StopReason;

const char* reason_name(StopReason reason) {
    switch (reason) {
        case StopReason::kRunning:
            return "running";
        case StopReason::kEnd:
            return "end";
        case StopReason::kStop:
            return "stop";
        case StopReason::kLength:
            return "length";
        case StopReason::kContext:
            return "context";
    }
    return "running";
}
