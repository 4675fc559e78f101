//! Tasks (ams-model section 7): the starts, stops and removals that are going on. They are not kept anywhere; they
//! follow from what is wanted of an instance and what was seen of it.

use fanlight_api::ams::{InstanceStatus, Task};

use crate::core::model::{InstanceRecord, Target};

/// The task of an instance; none: nothing is going on.
pub fn of(record: &InstanceRecord) -> Option<Task> {
    let observed = &record.observed;
    // A start that has not been carried out yet is about a later run than the one that was seen.
    let ahead = observed.run < record.intent.run;
    let status = status(record.intent.target, observed.status, ahead, record.base)?;
    let verb = match record.intent.target {
        Target::Stopped | Target::Deleted => "stop",
        _ if record.base => "bootstrap",
        _ => "start",
    };
    Some(Task {
        id: format!("{}-{verb}", record.id),
        status: status.into(),
        object_id: record.id.to_string(),
        object_type: "instance".into(),
    })
}

fn status(target: Target, seen: InstanceStatus, ahead: bool, base: bool) -> Option<&'static str> {
    use InstanceStatus as S;
    match (target, seen) {
        (Target::Prepared, S::Created) => Some("created"),
        (Target::Prepared, _) => None,
        (Target::Running, S::Created) => Some("created"),
        (Target::Running, S::Prepared) => Some("prepared"),
        (Target::Running, S::Started) => Some("started"),
        // An application is being made in it.
        (Target::Running, S::Running) if base => Some("running"),
        (Target::Running, S::Stopped) if ahead => Some("prepared"),
        (Target::Running, _) => None,
        (Target::Stopped, S::Prepared | S::Started | S::Running) => Some("shutdown"),
        (Target::Stopped, _) => None,
        (Target::Deleted, _) => Some("shutdown"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_task_while_something_is_going_on_and_none_before_and_after() {
        use InstanceStatus as S;
        for (target, seen, ahead, base, expected) in [
            (Target::Prepared, S::Created, false, false, Some("created")),
            (Target::Prepared, S::Prepared, false, false, None),
            (Target::Running, S::Created, true, false, Some("created")),
            (Target::Running, S::Prepared, true, false, Some("prepared")),
            (Target::Running, S::Started, false, false, Some("started")),
            (Target::Running, S::Running, false, false, None),
            (Target::Running, S::Running, false, true, Some("running")),
            (Target::Running, S::Stopped, false, false, None),
            (Target::Running, S::Stopped, true, false, Some("prepared")),
            (Target::Running, S::Error, false, false, None),
            (Target::Stopped, S::Running, false, false, Some("shutdown")),
            (Target::Stopped, S::Stopped, false, false, None),
            (Target::Stopped, S::Error, false, false, None),
            (Target::Deleted, S::Stopped, false, false, Some("shutdown")),
        ] {
            assert_eq!(status(target, seen, ahead, base), expected, "{target:?} {seen:?} {ahead} {base}");
        }
    }
}
