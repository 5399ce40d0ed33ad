//! How big a machine is, as types that cannot hold an impossible size.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Number of virtual processors, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vcpus(pub u32);

/// Memory in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemoryMib(pub u32);

impl MemoryMib {
    /// The same in bytes.
    pub const fn bytes(self) -> u64 {
        (self.0 as u64) << 20
    }
}

impl fmt::Display for MemoryMib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// Processors and memory of a machine. Fixed for the life of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Memory of the guest.
    pub memory: MemoryMib,
}

impl Shape {
    /// What `minimal` has, and what is meant where nothing is said.
    pub const DEFAULT: Shape = Shape {
        vcpus: Vcpus(1),
        memory: MemoryMib(512),
    };
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vCPU, {}", self.vcpus.0, self.memory)
    }
}

/// The largest machine that may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShapeLimits {
    /// Most processors.
    pub max_vcpus: Vcpus,
    /// Most memory.
    pub max_memory: MemoryMib,
}

impl ShapeLimits {
    /// The least memory the guest's kernel and agent start in.
    pub const MIN_MEMORY: MemoryMib = MemoryMib(128);

    /// A shape from untrusted numbers; `None` stands for the default.
    pub fn check(self, vcpus: Option<i64>, memory_mib: Option<i64>) -> Result<Shape, ShapeError> {
        let vcpus = vcpus.unwrap_or(i64::from(Shape::DEFAULT.vcpus.0));
        if vcpus < 1 || vcpus > i64::from(self.max_vcpus.0) {
            return Err(ShapeError::Vcpus {
                asked: vcpus,
                max: self.max_vcpus.0,
            });
        }
        let memory = memory_mib.unwrap_or(i64::from(Shape::DEFAULT.memory.0));
        let (min, max) = (Self::MIN_MEMORY.0, self.max_memory.0);
        if memory < i64::from(min) || memory > i64::from(max) || memory % 2 != 0 {
            return Err(ShapeError::Memory {
                asked: memory,
                min,
                max,
            });
        }
        Ok(Shape {
            // Both were checked to lie in a u32's range.
            vcpus: Vcpus(vcpus as u32),
            memory: MemoryMib(memory as u32),
        })
    }
}

/// Why a machine of the size that was asked for cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Too few or too many processors.
    #[error("{asked} vCPUs cannot be had: ask for 1 to {max}")]
    Vcpus {
        /// What was asked for.
        asked: i64,
        /// The most there may be.
        max: u32,
    },
    /// Too little, too much or odd memory.
    #[error("{asked} MiB of memory cannot be had: ask for an even number from {min} to {max}")]
    Memory {
        /// What was asked for, in MiB.
        asked: i64,
        /// The least, in MiB.
        min: u32,
        /// The most, in MiB.
        max: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ShapeLimits = ShapeLimits {
        max_vcpus: Vcpus(4),
        max_memory: MemoryMib(4096),
    };

    #[test]
    fn impossible_shapes_are_refused_with_the_bounds() {
        for vcpus in [0, -1, 5, i64::MAX, i64::MIN] {
            assert!(LIMITS.check(Some(vcpus), None).is_err(), "{vcpus}");
        }
        for memory in [0, -2, 127, 129, 4098, i64::MAX, i64::MIN] {
            assert!(LIMITS.check(None, Some(memory)).is_err(), "{memory}");
        }
        let error = LIMITS.check(Some(9), None).unwrap_err().to_string();
        assert_eq!(error, "9 vCPUs cannot be had: ask for 1 to 4");
    }

    #[test]
    fn nothing_said_means_the_default() {
        assert_eq!(LIMITS.check(None, None), Ok(Shape::DEFAULT));
        assert_eq!(MemoryMib(512).bytes(), 512 << 20);
    }
}
