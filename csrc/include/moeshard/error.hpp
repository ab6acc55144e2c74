// The base of every error that moeshard raises; in Python it is moeshard.MoeshardError.
#pragma once

#include <stdexcept>

namespace moeshard {

class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

}  // namespace moeshard
