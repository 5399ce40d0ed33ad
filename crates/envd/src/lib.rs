//! envd
