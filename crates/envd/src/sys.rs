//! The kernel near parts.
