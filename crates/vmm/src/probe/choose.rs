//! Which accelerator is used. Pure.

use serde::Serialize;

use super::HostReport;
use crate::{Accelerator, VmmError};

/// An accelerator and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// How guests are executed.
    pub accelerator: Accelerator,
    /// Why, as a sentence.
    pub why: String,
}

/// Chooses how guests are executed: as the operator asks, else KVM where it was seen to
/// work, else TCG, which always works. KVM that does not work here is refused even if asked
/// for.
pub fn choose(report: &HostReport, asked: Option<Accelerator>) -> Result<Choice, VmmError> {
    let choice = |accelerator, why: String| Ok(Choice { accelerator, why });
    match (asked, report.kvm.usable) {
        (Some(Accelerator::Kvm), false) => Err(VmmError::Accelerator {
            asked: Accelerator::Kvm,
            why: report.kvm.why.clone(),
        }),
        (Some(accelerator), _) => choice(accelerator, "the operator asked for it".into()),
        (None, true) => choice(Accelerator::Kvm, report.kvm.why.clone()),
        (None, false) => choice(
            Accelerator::Tcg,
            format!(
                "guests are emulated in software, since KVM cannot be used: {}",
                report.kvm.why
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_never_taken_where_it_does_not_work() {
        let mut report = super::super::host(None).unwrap();
        report.kvm.usable = false;
        report.kvm.why = "it is broken".into();
        let choice = choose(&report, None).unwrap();
        assert_eq!(choice.accelerator, Accelerator::Tcg);
        assert!(choice.why.ends_with("it is broken"));
        let error = choose(&report, Some(Accelerator::Kvm)).unwrap_err();
        assert!(error.to_string().contains("it is broken"), "{error}");
        report.kvm.usable = true;
        assert_eq!(choose(&report, None).unwrap().accelerator, Accelerator::Kvm);
        let asked = choose(&report, Some(Accelerator::Tcg)).unwrap();
        assert_eq!(asked.accelerator, Accelerator::Tcg);
    }
}
