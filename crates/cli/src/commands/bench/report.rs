//! What was measured, as a table for people and as JSON for programs.

use std::time::Duration;

use serde_json::{Value, json};

use super::statistics::Sample;
use crate::error::Failure;
use crate::output::{Printer, Table, Tone, bytes, milliseconds};

/// How a phase's numbers are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Milliseconds,
    Bytes,
    BytesPerSecond,
    PercentOfCore,
}

impl Unit {
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Unit::Milliseconds => milliseconds(Duration::from_secs_f64(value.max(0.0) / 1000.0)),
            Unit::Bytes => bytes(value.max(0.0) as u64),
            // In powers of ten, as networks and disks are measured.
            Unit::BytesPerSecond => format!("{:.0} MB/s", value / 1e6),
            Unit::PercentOfCore => format!("{value:.2} %"),
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Unit::Milliseconds => "ms",
            Unit::Bytes => "bytes",
            Unit::BytesPerSecond => "bytes_per_second",
            Unit::PercentOfCore => "percent_of_core",
        }
    }

    /// Whether `value` is as good as `target`.
    fn keeps(self, value: f64, target: f64) -> bool {
        match self {
            Unit::BytesPerSecond => value >= target,
            Unit::Milliseconds | Unit::Bytes | Unit::PercentOfCore => value <= target,
        }
    }

    /// What a value is that does not.
    const fn miss(self) -> &'static str {
        match self {
            Unit::BytesPerSecond => "below target",
            Unit::Milliseconds | Unit::Bytes | Unit::PercentOfCore => "above target",
        }
    }
}

/// One line of the table.
#[derive(Debug)]
pub(super) struct Phase {
    pub(super) name: String,
    pub(super) unit: Unit,
    pub(super) sample: Sample,
    pub(super) target: Option<f64>,
    /// Why there are no numbers.
    pub(super) missing: Option<String>,
}

impl Phase {
    /// A line of these measurements, in any order.
    pub(super) fn new(
        name: impl Into<String>,
        unit: Unit,
        values: Vec<f64>,
        target: Option<f64>,
    ) -> Self {
        Phase {
            name: name.into(),
            unit,
            sample: Sample::new(values),
            target,
            missing: None,
        }
    }

    /// A line that says why it is empty.
    pub(super) fn missing(name: &str, unit: Unit, target: Option<f64>, why: String) -> Self {
        Phase {
            missing: Some(why),
            ..Phase::new(name, unit, Vec::new(), target)
        }
    }

    /// Whether the median keeps the target; `None` where one of them is missing.
    pub(super) fn met(&self) -> Option<bool> {
        Some(self.unit.keeps(self.sample.median()?, self.target?))
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "phase": self.name,
            "unit": self.unit.word(),
            "median": self.sample.median(),
            "p95": self.p95(),
            "min": self.sample.quantile(0.0),
            "max": self.sample.quantile(1.0),
            "n": self.sample.n(),
            "target": self.target,
            "met": self.met(),
            "missing": self.missing,
        })
    }

    /// What all but one in twenty keep: of a rate, the slow end.
    fn p95(&self) -> Option<f64> {
        match self.unit {
            Unit::BytesPerSecond => self.sample.quantile(0.05),
            Unit::Milliseconds | Unit::Bytes | Unit::PercentOfCore => self.sample.p95(),
        }
    }
}

/// Lines with their targets, and whether they keep them.
pub(super) fn table(phases: &[Phase]) -> Table {
    let mut table = Table::new(["PHASE", "MEDIAN", "P95", "N", "TARGET", ""]).right([1, 2, 3, 4]);
    for phase in phases {
        let value = |value: Option<f64>| {
            value
                .map(|value| phase.unit.show(value))
                .unwrap_or_else(|| "-".to_owned())
        };
        let (word, tone) = match (phase.met(), &phase.missing) {
            (_, Some(why)) => (why.clone(), Tone::Dim),
            (Some(true), None) => ("ok".to_owned(), Tone::Good),
            (Some(false), None) => (phase.unit.miss().to_owned(), Tone::Bad),
            (None, None) => (String::new(), Tone::Plain),
        };
        table.row([
            (phase.name.clone(), Tone::Plain),
            (value(phase.sample.median()), Tone::Plain),
            (value(phase.p95()), Tone::Plain),
            (phase.sample.n().to_string(), Tone::Dim),
            (
                phase
                    .target
                    .map(|target| phase.unit.show(target))
                    .unwrap_or_default(),
                Tone::Dim,
            ),
            (word, tone),
        ]);
    }
    table
}

/// Shows what was measured and under which conditions, as a table or as JSON.
pub(super) fn show(
    conditions: &Value,
    phases: &[Phase],
    as_json: bool,
    printer: &Printer,
) -> Result<(), Failure> {
    if as_json {
        return printer.json(&json!({
            "conditions": conditions,
            "phases": phases.iter().map(Phase::to_json).collect::<Vec<Value>>(),
        }));
    }
    printer.table(table(phases));
    show_conditions(conditions, printer);
    Ok(())
}

/// What else one must know to compare the numbers.
pub(super) fn show_conditions(conditions: &Value, printer: &Printer) {
    printer.line("");
    printer.heading("conditions");
    let mut table = Table::new([]);
    if let Value::Object(conditions) = conditions {
        for (name, value) in conditions {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            table.row([(name.replace('_', " "), Tone::Dim), (text, Tone::Plain)]);
        }
    }
    printer.table(table);
}

/// How busy the machine was lately.
pub(super) fn load_average() -> Option<String> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    Some(
        text.split_whitespace()
            .take(3)
            .collect::<Vec<_>>()
            .join(" "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_by_the_median() {
        let phase = Phase::new(
            "x",
            Unit::Milliseconds,
            vec![100.0, 200.0, 10_000.0],
            Some(300.0),
        );
        assert_eq!(phase.met(), Some(true));
        assert_eq!(phase.to_json()["median"], 200.0);
        let phase = Phase::new("x", Unit::Milliseconds, vec![301.0], Some(300.0));
        assert_eq!(phase.met(), Some(false));
        assert_eq!(
            Phase::missing("x", Unit::Bytes, Some(1.0), "why".into()).met(),
            None
        );
    }

    #[test]
    fn a_rate_should_be_high_and_its_slow_end_is_told() {
        let rates = (0..=100).map(f64::from).collect();
        let phase = Phase::new("x", Unit::BytesPerSecond, rates, Some(40.0));
        assert_eq!(phase.met(), Some(true));
        assert_eq!(phase.to_json()["p95"], 5.0);
        let phase = Phase::new("x", Unit::BytesPerSecond, vec![39.0], Some(40.0));
        assert_eq!(phase.met(), Some(false));
    }
}
