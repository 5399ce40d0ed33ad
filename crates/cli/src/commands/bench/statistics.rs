//! Numbers out of many measurements.

/// Measurements of one thing, in ascending order.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample(Vec<f64>);

impl Sample {
    /// Takes the measurements in any order.
    pub(super) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Sample(values)
    }

    /// How many.
    pub(super) fn n(&self) -> usize {
        self.0.len()
    }

    /// The value below which a share `q` (0 to 1) of the measurements lies, interpolated
    /// between the two nearest ranks (Hyndman and Fan's type 7); `None` without any.
    pub(super) fn quantile(&self, q: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        let rank = q.clamp(0.0, 1.0) * last as f64;
        let (below, above) = (rank.floor() as usize, rank.ceil() as usize);
        let (low, high) = (*self.0.get(below)?, *self.0.get(above)?);
        Some(low + (high - low) * (rank - rank.floor()))
    }

    /// Half of them are not above this.
    pub(super) fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }

    /// All but one in twenty are not above this.
    pub(super) fn p95(&self) -> Option<f64> {
        self.quantile(0.95)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate_between_ranks() {
        let sample = Sample::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(sample.median(), Some(2.5));
        assert_eq!(sample.quantile(0.0), Some(1.0));
        assert_eq!(sample.quantile(1.0), Some(4.0));
        let hundred = Sample::new((0..=100).map(f64::from).collect());
        assert_eq!(hundred.p95(), Some(95.0));
    }

    #[test]
    fn few_measurements_are_no_trouble() {
        assert_eq!(Sample::new(vec![]).median(), None);
        assert_eq!(Sample::new(vec![7.0]).p95(), Some(7.0));
        assert_eq!(Sample::new(vec![1.0, 2.0]).median(), Some(1.5));
    }
}
