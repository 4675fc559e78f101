//! Figures: one JSON line each on standard output.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::machine;

/// What a value must keep to.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    None,
    AtMost(f64),
    AtLeast(f64),
}

/// Prints figures, and remembers whether all bounds were kept.
pub struct Figures {
    bench: &'static str,
    suffix: &'static str,
    setting: BTreeMap<&'static str, Value>,
    missed: Vec<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    bench: &'a str,
    metric: &'a str,
    value: f64,
    unit: &'a str,
    bound: Option<f64>,
    ok: bool,
    #[serde(flatten)]
    setting: &'a BTreeMap<&'static str, Value>,
}

impl Figures {
    pub fn new(bench: &'static str, seed: u64) -> Self {
        let mut setting = BTreeMap::new();
        let date = machine::says("date", &["-u", "+%Y-%m-%d"]);
        let commit = machine::says("git", &["rev-parse", "--short", "HEAD"]);
        setting.insert("date", date.into());
        setting.insert("commit", if commit.is_empty() { "unknown".into() } else { commit.into() });
        setting.insert("machine", machine::describe().into());
        setting.insert("seed", seed.into());
        Self { bench, suffix: "", setting, missed: Vec::new() }
    }

    /// Adds something that whoever repeats the measurement has to know.
    pub fn with(&mut self, name: &'static str, value: impl Into<Value>) {
        self.setting.insert(name, value.into());
    }

    /// All further metrics end in this.
    pub fn set_suffix(&mut self, suffix: &'static str) {
        self.suffix = suffix;
    }

    /// Prints one figure.
    ///
    /// # Errors
    /// It is not a number: it was not measured.
    pub fn print(&mut self, metric: &str, value: f64, unit: &str, bound: Bound) -> Result<()> {
        let metric = format!("{metric}{}", self.suffix);
        ensure!(value.is_finite(), "{metric} could not be measured: {value}");
        let (bound, ok) = match bound {
            Bound::None => (None, true),
            Bound::AtMost(most) => (Some(most), value <= most),
            Bound::AtLeast(least) => (Some(least), value >= least),
        };
        if !ok {
            self.missed.push(metric.clone());
        }
        let value = (value * 1000.0).round() / 1000.0;
        let line =
            Line { bench: self.bench, metric: &metric, value, unit, bound, ok, setting: &self.setting };
        println!("{}", serde_json::to_string(&line)?);
        Ok(())
    }

    /// The metrics that missed their bound.
    pub fn missed(&self) -> &[String] {
        &self.missed
    }
}

/// A percentile, by the nearest rank; not a number where nothing was measured.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// The middle value.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 99.0), 198.0);
        assert_eq!(percentile(&values, 100.0), 200.0);
        assert_eq!(median(&values), 100.0);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan(), "nothing measured is no number");
    }
}
