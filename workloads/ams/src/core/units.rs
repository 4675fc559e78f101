//! Which unit of AMS looks after which instance. Every unit computes the same from the same list of units that are there:
//! each instance goes to the unit with the highest number for it (rendezvous hashing), so that a unit that comes or
//! goes moves only its own part.

use std::collections::BTreeSet;

/// The units that are there, as one of them knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Units {
    own: String,
    live: BTreeSet<String>,
}

impl Units {
    /// Nobody is known yet, not even we.
    pub fn new(own: &str) -> Self {
        Self { own: own.to_owned(), live: BTreeSet::new() }
    }

    /// The same, with these that are there.
    #[must_use]
    pub fn with(&self, live: BTreeSet<String>) -> Self {
        Self { own: self.own.clone(), live }
    }

    /// Whether a unit is there.
    pub fn is_live(&self, unit: &str) -> bool {
        self.live.contains(unit)
    }

    /// Who looks after something.
    pub fn owner(&self, id: &str) -> Option<&str> {
        self.live.iter().max_by_key(|unit| (weight(unit, id), *unit)).map(String::as_str)
    }

    /// Whether that is we.
    pub fn is_ours(&self, id: &str) -> bool {
        self.owner(id) == Some(self.own.as_str())
    }
}

/// The same on every machine and in every version: FNV-1a of both names, well mixed at the end.
fn weight(unit: &str, id: &str) -> u64 {
    let bytes = unit.bytes().chain([0]).chain(id.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(own: &str, live: &[&str]) -> Units {
        Units::new(own).with(live.iter().map(|unit| (*unit).to_owned()).collect())
    }

    #[test]
    fn every_instance_has_one_owner_and_all_units_agree_on_it() {
        let live = ["a", "b", "c"];
        let mut parts = [0; 3];
        for number in 0..3000 {
            let id = format!("i{number}");
            let owners: Vec<usize> = (0..3).filter(|unit| units(live[*unit], &live).is_ours(&id)).collect();
            assert_eq!(owners.len(), 1, "{id}");
            parts[owners[0]] += 1;
        }
        assert!(parts.iter().all(|part| (800..1200).contains(part)), "{parts:?}");
    }

    #[test]
    fn a_unit_that_goes_leaves_the_others_parts_as_they_are() {
        let (before, after) = (units("a", &["a", "b", "c"]), units("a", &["a", "c"]));
        for number in 0..1000 {
            let id = format!("i{number}");
            if before.owner(&id) != Some("b") {
                assert_eq!(before.owner(&id), after.owner(&id), "{id}");
            }
        }
    }

    #[test]
    fn who_is_not_there_owns_nothing() {
        assert_eq!(Units::new("a").owner("i"), None);
        assert!(!units("a", &["b"]).is_ours("i"));
        assert!(units("a", &["a"]).is_ours("i"));
        assert!(units("a", &["b"]).is_live("b"));
    }
}
