//! Applications that lie in folders on this machine: finding them and packing them for AMS.
//!
//! What a manifest may say is AMS's business; here only its `name` is read.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use flate2::{Compression, write::GzEncoder};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// An application ready to be sent to AMS.
#[derive(Clone, Debug, PartialEq)]
pub struct Package {
    /// Name in the manifest.
    pub name: String,
    /// Where it lies.
    pub folder: PathBuf,
    /// SHA-256 of the archive, lower-case hex. The same files give the same digest.
    pub digest: String,
    /// tar.gz with the manifest at its root.
    pub archive: Vec<u8>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// Packs each folder below `folder` that holds a manifest, in order of name; or `folder` itself if it holds one.
///
/// # Errors
/// Names the folder or manifest that cannot be read.
pub fn find(folder: &Path) -> Result<Vec<Package>> {
    if folder.join("manifest.yaml").is_file() {
        return Ok(vec![pack(folder)?]);
    }
    let entries =
        fs::read_dir(folder).with_context(|| format!("looking for applications in {}", folder.display()))?;
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("looking for applications in {}", folder.display()))?.path();
        if path.join("manifest.yaml").is_file() {
            folders.push(path);
        }
    }
    folders.sort();
    let packages = folders.iter().map(|folder| pack(folder)).collect::<Result<Vec<_>>>()?;
    if packages.is_empty() {
        bail!("no folder with a manifest.yaml is in {}", folder.display());
    }
    Ok(packages)
}

fn pack(folder: &Path) -> Result<Package> {
    let manifest = folder.join("manifest.yaml");
    let text = fs::read_to_string(&manifest).with_context(|| format!("reading {}", manifest.display()))?;
    let named: Named =
        serde_yaml_ng::from_str(&text).with_context(|| format!("reading {}", manifest.display()))?;
    let archive = archive(folder, GzEncoder::new(Vec::new(), Compression::fast()))?
        .finish()
        .with_context(|| format!("packing {}", folder.display()))?;
    let digest = hex::encode(Sha256::digest(&archive));
    Ok(Package { name: named.name, folder: folder.to_owned(), digest, archive })
}

/// Writes the files of a folder as tar, the same bytes for the same files.
///
/// # Errors
/// Names the file that cannot be read.
pub fn archive<W: Write>(folder: &Path, writer: W) -> Result<W> {
    let mut files = Vec::new();
    collect(folder, Path::new(""), &mut files)?;
    files.sort();
    let mut archive = tar::Builder::new(writer);
    // Owners and times of this machine do not belong into a package, and would change its digest.
    archive.mode(tar::HeaderMode::Deterministic);
    for file in &files {
        archive
            .append_path_with_name(folder.join(file), file)
            .with_context(|| format!("packing {}", folder.join(file).display()))?;
    }
    archive.into_inner().with_context(|| format!("packing {}", folder.display()))
}

fn collect(folder: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let here = folder.join(below);
    for entry in fs::read_dir(&here).with_context(|| format!("reading {}", here.display()))? {
        let entry = entry.with_context(|| format!("reading {}", here.display()))?;
        let name = below.join(entry.file_name());
        // Links are followed: a package holds files, not ways out of it.
        let about =
            fs::metadata(entry.path()).with_context(|| format!("reading {}", entry.path().display()))?;
        if about.is_dir() {
            if name.components().count() > 32 {
                bail!("{} is nested too deeply for a package", entry.path().display());
            }
            collect(folder, &name, files)?;
        } else if about.is_file() {
            files.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("has one")).expect("made");
        fs::write(path, text).expect("written");
    }

    #[test]
    fn folders_with_a_manifest_are_found_in_order_and_packed_the_same_each_time() {
        let folder = tempfile::tempdir().expect("temporary folder");
        write(folder.path(), "two/manifest.yaml", "name: beta\ncommand: [true]\n");
        write(folder.path(), "one/manifest.yaml", "name: alpha\ncommand: [true]\n");
        write(folder.path(), "one/data/file", "x");
        write(folder.path(), "notes.txt", "no application");
        let first = find(folder.path()).expect("found");
        assert_eq!(first.iter().map(|package| package.name.as_str()).collect::<Vec<_>>(), ["alpha", "beta"]);
        assert_eq!(find(folder.path()).expect("found"), first);
        write(folder.path(), "one/data/file", "y");
        assert_ne!(find(folder.path()).expect("found")[0].digest, first[0].digest);
        assert_eq!(find(&folder.path().join("two")).expect("found").len(), 1);
    }

    #[test]
    fn a_folder_without_applications_and_a_manifest_without_a_name_are_errors_that_say_where() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let error = find(folder.path()).expect_err("empty").to_string();
        assert!(error.contains("manifest.yaml"), "{error}");
        write(folder.path(), "bad/manifest.yaml", "command: [true]\n");
        let error = format!("{:#}", find(folder.path()).expect_err("no name"));
        assert!(error.contains("bad/manifest.yaml") && error.contains("name"), "{error}");
    }
}
