//! A small registry of counters, gauges and histograms, written in Prometheus' text format (version 0.0.4).
//!
//! Names follow the program's reference. Series of one family are bounded, because some labels come from
//! outside.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

/// Most series of one family; more are dropped.
const MAX_SERIES: usize = 1000;

/// Bounds of histograms of times, seconds.
pub const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Bounds of histograms of sizes, bytes.
pub const BYTES: &[f64] = &[100.0, 1e3, 1e4, 1e5, 1e6, 1e7];

/// The registry of a program.
#[derive(Debug, Default)]
pub struct Registry {
    families: Mutex<BTreeMap<&'static str, Family>>,
}

#[derive(Debug)]
struct Family {
    kind: Kind,
    help: &'static str,
    series: BTreeMap<String, Series>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

#[derive(Debug)]
enum Series {
    Number(f64),
    Histogram { buckets: Vec<u64>, sum: f64, count: u64 },
}

/// Labels of one series, in the order in which they are written.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares a counter.
    pub fn counter(&self, name: &'static str, help: &'static str) {
        self.declare(name, help, Kind::Counter);
    }

    /// Declares a gauge.
    pub fn gauge(&self, name: &'static str, help: &'static str) {
        self.declare(name, help, Kind::Gauge);
    }

    /// Declares a histogram with the upper bounds given, ascending.
    pub fn histogram(&self, name: &'static str, help: &'static str, bounds: &'static [f64]) {
        self.declare(name, help, Kind::Histogram(bounds));
    }

    fn declare(&self, name: &'static str, help: &'static str, kind: Kind) {
        let family = Family { kind, help, series: BTreeMap::new() };
        self.families.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_insert(family);
    }

    /// Adds to a counter or gauge.
    pub fn add(&self, name: &str, labels: Labels<'_>, amount: f64) {
        self.with(name, labels, |series| {
            if let Series::Number(number) = series {
                *number += amount;
            }
        });
    }

    /// Sets a gauge.
    pub fn set(&self, name: &str, labels: Labels<'_>, value: f64) {
        self.with(name, labels, |series| {
            if let Series::Number(number) = series {
                *number = value;
            }
        });
    }

    /// Records a value in a histogram.
    pub fn observe(&self, name: &str, labels: Labels<'_>, value: f64) {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(family) = families.get_mut(name) else { return };
        let Kind::Histogram(bounds) = family.kind else { return };
        if let Some(Series::Histogram { buckets, sum, count }) = family.series(labels) {
            for (bucket, bound) in buckets.iter_mut().zip(bounds) {
                *bucket += u64::from(value <= *bound);
            }
            *sum += value;
            *count += 1;
        }
    }

    fn with(&self, name: &str, labels: Labels<'_>, change: impl FnOnce(&mut Series)) {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = families.get_mut(name).and_then(|family| family.series(labels)) {
            change(series);
        }
    }

    /// Everything, as a scraper reads it.
    pub fn render(&self) -> String {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = String::new();
        for (name, family) in families.iter() {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram(_) => "histogram",
            };
            let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
            for (labels, series) in &family.series {
                match (series, family.kind) {
                    (Series::Histogram { buckets, sum, count }, Kind::Histogram(bounds)) => {
                        let comma = if labels.is_empty() { "" } else { "," };
                        for (bucket, bound) in buckets.iter().zip(bounds) {
                            let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {bucket}");
                        }
                        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
                        let _ = writeln!(out, "{name}_sum{} {sum}", braces(labels));
                        let _ = writeln!(out, "{name}_count{} {count}", braces(labels));
                    }
                    (Series::Number(number), _) => {
                        let _ = writeln!(out, "{name}{} {number}", braces(labels));
                    }
                    (Series::Histogram { .. }, _) => {}
                }
            }
        }
        out
    }
}

impl Family {
    fn series(&mut self, labels: Labels<'_>) -> Option<&mut Series> {
        let key = write_labels(labels);
        if !self.series.contains_key(&key) && self.series.len() >= MAX_SERIES {
            return None;
        }
        Some(self.series.entry(key).or_insert_with(|| match self.kind {
            Kind::Histogram(bounds) => {
                Series::Histogram { buckets: vec![0; bounds.len()], sum: 0.0, count: 0 }
            }
            _ => Series::Number(0.0),
        }))
    }
}

fn braces(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

fn write_labels(labels: Labels<'_>) -> String {
    let one = |(name, value): &(&str, &str)| {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        format!("{name}=\"{value}\"")
    };
    labels.iter().map(one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_written_as_a_scraper_reads_it() {
        let registry = Registry::new();
        registry.counter("requests_total", "Requests.");
        registry.gauge("sessions", "Sessions.");
        registry.histogram("seconds", "Times.", &[0.1, 1.0]);
        registry.add("requests_total", &[("method", "GET"), ("host", "a\"b")], 2.0);
        registry.set("sessions", &[], 3.0);
        registry.observe("seconds", &[], 0.5);
        registry.add("unheard_of", &[], 1.0);
        assert_eq!(
            registry.render(),
            "# HELP requests_total Requests.\n# TYPE requests_total counter\n\
             requests_total{method=\"GET\",host=\"a\\\"b\"} 2\n\
             # HELP seconds Times.\n# TYPE seconds histogram\n\
             seconds_bucket{le=\"0.1\"} 0\nseconds_bucket{le=\"1\"} 1\nseconds_bucket{le=\"+Inf\"} 1\n\
             seconds_sum 0.5\nseconds_count 1\n\
             # HELP sessions Sessions.\n# TYPE sessions gauge\nsessions 3\n"
        );
    }

    #[test]
    fn labels_from_outside_cannot_grow_a_family_without_bound() {
        let registry = Registry::new();
        registry.counter("hits", "Hits.");
        for number in 0..2 * MAX_SERIES {
            registry.add("hits", &[("host", &number.to_string())], 1.0);
        }
        assert_eq!(registry.render().lines().count(), MAX_SERIES + 2);
    }
}
