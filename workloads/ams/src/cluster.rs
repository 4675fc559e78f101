//! Who this cluster is: an id in the store, and a copy of it in the folder.
//!
//! What lies in the folder without a record in the store is nobody's, and AMS removes it. With the wrong store that
//! would be everything, so the two are compared before anything else is looked at.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use fanlight_api::ApplicationId;
use fanlight_store::{Handle, StoreError, StoreExt as _};

use crate::core::model::{ClusterRecord, key};

/// File of the folder that holds the id.
const FILE: &str = "cluster";
/// Folders whose content would be removed.
const CONTENT: [&str; 3] = ["packages", "images", "instances"];

/// Folder and store do not go together.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The store has nothing, the folder has.
    #[error(
        "the folder {} belongs to a cluster, and the store has no cluster: set store.url to the store that belongs to \
         the folder, or set folder to an empty folder",
        .folder.display()
    )]
    Empty {
        /// Which.
        folder: PathBuf,
    },
    /// Both have something.
    #[error(
        "the folder {} belongs to cluster {of_folder}, and the store to cluster {of_store}: set store.url to the store \
         that belongs to the folder, or set folder to an empty folder",
        .folder.display()
    )]
    Other {
        /// Which.
        folder: PathBuf,
        /// Id that the folder says.
        of_folder: String,
        /// Id that the store says.
        of_store: String,
    },
    /// The file of the folder.
    #[error("reading or writing {}, which says whose folder it is", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The store.
    #[error("the record of the cluster cannot be used")]
    Store(#[from] StoreError),
}

/// The cluster of a store, made where there is none. `lasts` is false for a store that is empty at every start.
///
/// # Errors
/// The folder is that of another cluster, or one of the two cannot be used.
pub(crate) async fn open(
    store: &Handle,
    folder: &Path,
    name: &str,
    lasts: bool,
) -> Result<ClusterRecord, ClusterError> {
    let path = folder.join(FILE);
    let fail = |source| ClusterError::Io { path: path.clone(), source };
    let of_folder = match fs::read_to_string(&path) {
        Ok(text) => Some(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(fail(error)),
    };
    let of_store = store.get_json::<ClusterRecord>(key::CLUSTER).await?.map(|record| record.value.id);
    let folder = folder.to_owned();
    match (&of_folder, of_store) {
        (Some(_), None) => return Err(ClusterError::Empty { folder }),
        // Made before AMS wrote down whose it is.
        (None, None) if lasts && has_content(&folder) => return Err(ClusterError::Empty { folder }),
        (Some(of_folder), Some(of_store)) if *of_folder != of_store => {
            return Err(ClusterError::Other { folder, of_folder: of_folder.clone(), of_store });
        }
        _ => {}
    }
    let record = store
        .update_json::<ClusterRecord, _, _>(key::CLUSTER, |record| {
            // Any xid will do.
            let id = record.map_or_else(|| ApplicationId::generate().to_string(), |record| record.id);
            Some(ClusterRecord { id, name: name.to_owned() })
        })
        .await?;
    let record = record.expect("it was just written").value;
    if of_folder.is_none() && lasts {
        write(&path, &record.id).map_err(fail)?;
    }
    Ok(record)
}

/// Whole or not at all, also when the machine stops meanwhile: half an id would be that of another cluster.
fn write(path: &Path, id: &str) -> io::Result<()> {
    let draft = path.with_extension("new");
    fs::write(&draft, format!("{id}\n"))?;
    fs::File::open(&draft)?.sync_all()?;
    fs::rename(&draft, path)
}

fn has_content(folder: &Path) -> bool {
    CONTENT
        .iter()
        .any(|part| fs::read_dir(folder.join(part)).is_ok_and(|mut entries| entries.next().is_some()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fanlight_store::Embedded;

    use super::*;

    fn store() -> Handle {
        Arc::new(Embedded::memory())
    }

    #[tokio::test]
    async fn a_folder_stays_with_the_store_that_it_was_begun_with() {
        let folder = tempfile::tempdir().expect("made");
        let own = store();
        let first = open(&own, folder.path(), "one", true).await.expect("both are new");
        let again = open(&own, folder.path(), "two", true).await.expect("they belong together");
        assert_eq!((again.id, again.name.as_str()), (first.id.clone(), "two"));

        let empty = store();
        for lasts in [true, false] {
            let refused = open(&empty, folder.path(), "one", lasts).await.expect_err("the store is empty");
            assert!(refused.to_string().contains("store.url"), "{refused}");
        }
        let none = empty.get_json::<ClusterRecord>(key::CLUSTER).await.expect("read");
        assert!(none.is_none(), "what is refused leaves the store as it is");

        let elsewhere = tempfile::tempdir().expect("made");
        let other = store();
        let second = open(&other, elsewhere.path(), "two", true).await.expect("both are new");
        let refused =
            open(&other, folder.path(), "two", true).await.expect_err("they do not belong together");
        let text = refused.to_string();
        assert!(text.contains(&first.id) && text.contains(&second.id), "{text}");
    }

    #[tokio::test]
    async fn packages_of_a_folder_that_does_not_say_whose_it_is_are_not_left_to_an_empty_store() {
        let folder = tempfile::tempdir().expect("made");
        fs::create_dir_all(folder.path().join("packages/app")).expect("made");
        assert!(matches!(open(&store(), folder.path(), "one", true).await, Err(ClusterError::Empty { .. })));
        // A store that never lasts is empty by its nature, and says nothing about the folder.
        open(&store(), folder.path(), "one", false).await.expect("nothing is expected of it");
        assert!(!folder.path().join(FILE).exists());
        // A store with a cluster knew the folder before the file was written.
        let used = store();
        let elsewhere = tempfile::tempdir().expect("made");
        open(&used, elsewhere.path(), "one", true).await.expect("both are new");
        open(&used, folder.path(), "one", true).await.expect("it takes the folder over");
        assert!(folder.path().join(FILE).exists());
    }
}
