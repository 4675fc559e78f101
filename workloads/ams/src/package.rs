//! Application packages: tar (plain, gzip, bzip2) and zip, unpacked into a folder of their own.
//!
//! A package is somebody else's input. Everything that could reach beyond its folder, or fill the disk, is
//! refused with the name of the entry: absolute paths and `..`, devices and pipes, links that leave, entries
//! below a link, more bytes or entries than allowed, and archives that expand more than 200 times.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// How much larger than the archive its content may be, from [`RATIO_FROM`] on.
const MAX_RATIO: u64 = 200;
/// Below this many bytes the ratio says nothing: empty files compress well.
const RATIO_FROM: u64 = 16 << 20;

/// Padding behind the end of a tar, bytes.
const MAX_PADDING: u64 = 1 << 20;

/// Makes the same files in another folder, which is there and empty. They share their content, which is never written
/// again.
///
/// # Errors
/// The disk does not take it.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (kind, place) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            std::fs::create_dir(&place)?;
            copy(&entry.path(), &place)?;
            std::fs::set_permissions(&place, entry.metadata()?.permissions())?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(entry.path())?, &place)?;
        } else if std::fs::hard_link(entry.path(), &place).is_err() {
            // Too many names of one file, or another disk.
            std::fs::copy(entry.path(), &place)?;
        }
    }
    Ok(())
}

/// Packs a folder again, as tar with bzip2. Links stay links; owners and times are left out.
///
/// # Errors
/// The folder cannot be read, or the archive cannot be written.
pub fn pack(folder: &Path, file: &mut File) -> io::Result<()> {
    let mut builder = tar::Builder::new(bzip2::write::BzEncoder::new(file, bzip2::Compression::fast()));
    builder.follow_symlinks(false);
    builder.mode(tar::HeaderMode::Deterministic);
    builder.append_dir_all("", folder)?;
    builder.into_inner()?.finish()?;
    Ok(())
}

/// Packs a folder again, as tar, into a file without a name, and gives its SHA-256. Links stay links; owners and times
/// are left out.
///
/// # Errors
/// The folder cannot be read, or the archive cannot be written.
pub fn tar(folder: &Path, place: &Path) -> io::Result<(File, String)> {
    let mut builder = tar::Builder::new(tempfile::tempfile_in(place)?);
    builder.follow_symlinks(false);
    builder.mode(tar::HeaderMode::Deterministic);
    builder.append_dir_all("", folder)?;
    let mut file = builder.into_inner()?;
    let mut digest = Sha256::new();
    file.rewind()?;
    io::copy(&mut file, &mut digest)?;
    file.rewind()?;
    Ok((file, hex::encode(digest.finalize())))
}

/// Bounds of a package.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of all files together.
    pub unpacked_bytes: u64,
    /// Most files, folders and links.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { unpacked_bytes: 20 << 30, entries: 200_000 }
    }
}

/// Why a package was refused.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The first bytes are of no known kind.
    #[error("package malformed: neither tar, tar.gz, tar.bz2 nor zip")]
    UnknownFormat,
    /// The archive is damaged.
    #[error("package malformed: {0}")]
    Malformed(String),
    /// An entry is not allowed.
    #[error("package malformed: entry {entry:?} {reason}")]
    Entry {
        /// Its name in the archive.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Too much in it.
    #[error("package too large: more than {limit} {what}")]
    TooLarge {
        /// The bound.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
    /// It grows too much.
    #[error("package malformed: it expands more than {MAX_RATIO} times")]
    Bomb,
    /// Reading the archive, or writing what is in it, failed.
    #[error("unpacking {}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Unpacks the archive in `file` into `folder`, which must be an empty folder that nobody else writes to.
///
/// # Errors
/// The package is refused, or the disk does not take it; what was unpacked so far is left to the caller.
pub fn unpack(file: &mut File, folder: &Path, limits: Limits) -> Result<(), PackageError> {
    let io_error = |source| PackageError::Io { path: folder.to_owned(), source };
    let packed = file.metadata().map_err(io_error)?.len();
    let mut start = [0; 262];
    file.seek(SeekFrom::Start(0)).map_err(io_error)?;
    let mut filled = 0;
    while filled < start.len() {
        match file.read(&mut start[filled..]).map_err(io_error)? {
            0 => break,
            read => filled += read,
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(io_error)?;
    let mut target = Target { folder, limits, packed, bytes: 0, entries: 0 };
    match &start[..filled] {
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => unzip(file, &mut target),
        [0x1f, 0x8b, ..] => untar(flate2::read::MultiGzDecoder::new(file), &mut target),
        [b'B', b'Z', b'h', ..] => untar(bzip2::read::MultiBzDecoder::new(file), &mut target),
        start if start.get(257..262) == Some(b"ustar") => untar(file, &mut target),
        _ => Err(PackageError::UnknownFormat),
    }
}

/// Where a package goes, and how much came already.
struct Target<'a> {
    folder: &'a Path,
    limits: Limits,
    packed: u64,
    bytes: u64,
    entries: u64,
}

impl Target<'_> {
    /// Counts an entry and gives its path below the folder; none for the root itself.
    fn enter(&mut self, name: &str) -> Result<Option<PathBuf>, PackageError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(PackageError::TooLarge { limit: self.limits.entries, what: "entries" });
        }
        let path = inside(name).ok_or_else(|| refuse(name, "lies outside of the package"))?;
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        // An entry below a link would be written to where the link points.
        let mut parent = self.folder.to_owned();
        for part in path.parent().into_iter().flat_map(Path::components) {
            parent.push(part);
            match fs::symlink_metadata(&parent) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(_) => return Err(refuse(name, "lies below something that is no folder")),
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.make_folder(&parent)?,
                Err(source) => return Err(PackageError::Io { path: parent, source }),
            }
        }
        Ok(Some(self.folder.join(path)))
    }

    fn make_folder(&self, path: &Path) -> Result<(), PackageError> {
        match fs::DirBuilder::new().mode(0o755).create(path) {
            Ok(()) => {
                // The process's umask must not take the instance's right to read.
                fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                    .map_err(|source| io_at(path, source))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_folder(path) => Ok(()),
            Err(source) => Err(io_at(path, source)),
        }
    }

    fn file(&mut self, name: &str, mode: u32, content: &mut dyn Read) -> Result<(), PackageError> {
        let Some(path) = self.enter(name)? else { return Err(refuse(name, "has no name")) };
        let mode = if mode & 0o111 == 0 { 0o644 } else { 0o755 };
        // Later entries of a tar replace earlier ones.
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => return Err(refuse(name, "replaces a folder")),
            Ok(_) => fs::remove_file(&path).map_err(|source| io_at(&path, source))?,
            Err(_) => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .map_err(|source| io_at(&path, source))?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(PackageError::Malformed(format!("entry {name:?}: {error}"))),
            };
            self.bytes += read as u64;
            if self.bytes > self.limits.unpacked_bytes {
                return Err(PackageError::TooLarge { limit: self.limits.unpacked_bytes, what: "bytes" });
            }
            if self.bytes > RATIO_FROM && self.bytes / self.packed.max(1) > MAX_RATIO {
                return Err(PackageError::Bomb);
            }
            io::Write::write_all(&mut file, &buffer[..read]).map_err(|source| io_at(&path, source))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(|source| io_at(&path, source))
    }

    fn folder(&mut self, name: &str) -> Result<(), PackageError> {
        match self.enter(name)? {
            None => Ok(()),
            Some(path) if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_dir()) => {
                Err(refuse(name, "replaces a file"))
            }
            Some(path) => self.make_folder(&path),
        }
    }

    fn link(&mut self, name: &str, points_to: &str) -> Result<(), PackageError> {
        let Some(path) = self.enter(name)? else { return Err(refuse(name, "has no name")) };
        let parent = Path::new(name).parent().unwrap_or(Path::new(""));
        // `..` may only lead: behind a name that is itself a link it would climb from where that one points to.
        let climbs_late = Path::new(points_to)
            .components()
            .skip_while(|part| matches!(part, Component::ParentDir | Component::CurDir))
            .any(|part| part == Component::ParentDir);
        if points_to.is_empty() || climbs_late || inside(&parent.join(points_to).to_string_lossy()).is_none()
        {
            return Err(refuse(name, "is a link that leaves the package"));
        }
        if fs::symlink_metadata(&path).is_ok() {
            return Err(refuse(name, "is a link that replaces another entry"));
        }
        std::os::unix::fs::symlink(points_to, &path).map_err(|source| io_at(&path, source))
    }

    /// A second name of a file that was unpacked before.
    fn second_name(&mut self, name: &str, first: &str) -> Result<(), PackageError> {
        let Some(path) = self.enter(name)? else { return Err(refuse(name, "has no name")) };
        let Some(first) = self
            .enter(first)?
            .filter(|first| fs::symlink_metadata(first).is_ok_and(|metadata| metadata.is_file()))
        else {
            return Err(refuse(name, "is a second name of something that is no file of the package"));
        };
        if fs::symlink_metadata(&path).is_ok() {
            return Err(refuse(name, "is a second name that replaces another entry"));
        }
        fs::hard_link(&first, &path).map_err(|source| io_at(&path, source))
    }
}

fn untar(reader: impl Read, target: &mut Target<'_>) -> Result<(), PackageError> {
    let malformed = |error: io::Error| PackageError::Malformed(error.to_string());
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries().map_err(malformed)? {
        let mut entry = entry.map_err(malformed)?;
        let name = text(&entry.path_bytes())?;
        let mode = entry.header().mode().unwrap_or(0o644);
        match entry.header().entry_type() {
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                target.file(&name, mode, &mut entry)?;
            }
            tar::EntryType::Directory => target.folder(&name)?,
            tar::EntryType::Symlink => {
                let points_to =
                    entry.link_name_bytes().ok_or_else(|| refuse(&name, "is a link to nothing"))?;
                target.link(&name, &text(&points_to)?)?;
            }
            tar::EntryType::Link => {
                let first = entry.link_name_bytes().ok_or_else(|| refuse(&name, "is a link to nothing"))?;
                target.second_name(&name, &text(&first)?)?;
            }
            tar::EntryType::XGlobalHeader | tar::EntryType::XHeader => {}
            _ => return Err(refuse(&name, "is neither file, folder nor link")),
        }
    }
    // A tar ends before its compressed form does: what follows holds the checksum, and padding.
    let mut rest = archive.into_inner().take(MAX_PADDING);
    match io::copy(&mut rest, &mut io::sink()).map_err(malformed)? {
        MAX_PADDING => Err(PackageError::Malformed("there is more behind the end of the tar".into())),
        _ => Ok(()),
    }
}

fn unzip(file: &mut File, target: &mut Target<'_>) -> Result<(), PackageError> {
    const LINK: u32 = 0o120_000;
    const FOLDER: u32 = 0o040_000;
    const FILE: u32 = 0o100_000;
    let malformed = |error: zip::result::ZipError| PackageError::Malformed(error.to_string());
    let mut archive = zip::ZipArchive::new(file).map_err(malformed)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(malformed)?;
        let name = text(entry.name_raw())?;
        let mode = entry.unix_mode().unwrap_or(0o644);
        match mode & 0o170_000 {
            LINK => {
                let mut points_to = Vec::new();
                (&mut entry)
                    .take(4096)
                    .read_to_end(&mut points_to)
                    .map_err(|error| PackageError::Malformed(format!("entry {name:?}: {error}")))?;
                target.link(&name, &text(&points_to)?)?;
            }
            _ if entry.is_dir() => target.folder(&name)?,
            0 | FILE | FOLDER => target.file(&name, mode, &mut entry)?,
            _ => return Err(refuse(&name, "is neither file, folder nor link")),
        }
    }
    Ok(())
}

/// A name made relative and plain; none when it is absolute, climbs out, or could be read in two ways.
fn inside(name: &str) -> Option<PathBuf> {
    if name.contains(['\0', '\\']) {
        return None;
    }
    let mut path = PathBuf::new();
    for part in Path::new(name).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => {
                if !path.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

fn text(bytes: &[u8]) -> Result<String, PackageError> {
    String::from_utf8(bytes.to_vec())
        .map_err(|error| refuse(&String::from_utf8_lossy(error.as_bytes()), "has a name that is not UTF-8"))
}

fn refuse(entry: &str, reason: &'static str) -> PackageError {
    PackageError::Entry { entry: entry.chars().take(200).collect(), reason }
}

fn io_at(path: &Path, source: io::Error) -> PackageError {
    PackageError::Io { path: path.to_owned(), source }
}

fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    type Entry<'a> = (&'a str, tar::EntryType, &'a str);

    /// A tar of entries; the third part is the content of files and the target of links. Names are written
    /// raw, so that they can be as bad as wanted.
    fn tar_of(entries: &[Entry<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            let is_file = *kind == tar::EntryType::Regular;
            header.set_size(if is_file { content.len() as u64 } else { 0 });
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            if !is_file {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, if is_file { content.as_bytes() } else { b"" }).expect("appended");
        }
        builder.into_inner().expect("finished")
    }

    fn try_unpack(bytes: &[u8], limits: Limits) -> (tempfile::TempDir, Result<(), PackageError>) {
        let mut file = tempfile::tempfile().expect("made");
        file.write_all(bytes).expect("written");
        let folder = tempfile::tempdir().expect("made");
        let target = folder.path().join("package");
        fs::create_dir(&target).expect("made");
        let result = unpack(&mut file, &target, limits);
        (folder, result)
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;
    const LINK: tar::EntryType = tar::EntryType::Symlink;

    #[test]
    fn every_format_gives_the_same_files() {
        let tar = tar_of(&[
            ("./", tar::EntryType::Directory, ""),
            ("./manifest.yaml", FILE, "name: x"),
            ("bin/run", FILE, "#!/bin/sh\n"),
            ("bin/also", tar::EntryType::Link, "bin/run"),
            ("lib/link", LINK, "../bin/run"),
        ]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).expect("written");
        let mut bzip = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip.write_all(&tar).expect("written");
        let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default().unix_permissions(0o755);
        zip.add_directory("bin", options).expect("written");
        for (name, content) in
            [("manifest.yaml", "name: x"), ("bin/run", "#!/bin/sh\n"), ("bin/also", "#!/bin/sh\n")]
        {
            zip.start_file(name, options).expect("written");
            zip.write_all(content.as_bytes()).expect("written");
        }
        zip.add_symlink("lib/link", "../bin/run", options).expect("written");
        for (format, bytes) in [
            ("tar", tar),
            ("gzip", gzip.finish().expect("done")),
            ("bzip2", bzip.finish().expect("done")),
            ("zip", zip.finish().expect("done").into_inner()),
        ] {
            let (folder, result) = try_unpack(&bytes, Limits::default());
            result.unwrap_or_else(|error| panic!("{format}: {error}"));
            let root = folder.path().join("package");
            assert_eq!(fs::read_to_string(root.join("manifest.yaml")).expect(format), "name: x");
            for name in ["bin/run", "bin/also", "lib/link"] {
                assert_eq!(
                    fs::read_to_string(root.join(name)).expect(name),
                    "#!/bin/sh\n",
                    "{format} {name}"
                );
            }
            let mode = fs::metadata(root.join("bin/run")).expect(format).permissions().mode();
            assert_eq!(mode & 0o777, 0o755, "{format}");
        }
    }

    #[test]
    fn entries_that_reach_beyond_the_package_are_refused_and_write_nothing_there() {
        for (case, entries) in [
            ("parent", vec![("../evil", FILE, "x")]),
            ("hidden parent", vec![("a/../../evil", FILE, "x")]),
            ("absolute", vec![("/tmp/evil", FILE, "x")]),
            ("link out", vec![("l", LINK, "../../evil")]),
            ("link out by another link", vec![("b", LINK, "."), ("c", LINK, "b/../evil")]),
            ("absolute link", vec![("l", LINK, "/etc/passwd")]),
            ("through a link", vec![("l", LINK, "."), ("l/evil", FILE, "x")]),
            ("second name out", vec![("l", tar::EntryType::Link, "../../etc/passwd")]),
            ("second name of a link", vec![("l", LINK, "x"), ("m", tar::EntryType::Link, "l")]),
            ("device", vec![("d", tar::EntryType::Block, "")]),
            ("character device", vec![("d", tar::EntryType::Char, "")]),
            ("pipe", vec![("p", tar::EntryType::Fifo, "")]),
            ("no name", vec![(".", FILE, "x")]),
            ("file over folder", vec![("a/b", FILE, "x"), ("a", FILE, "x")]),
        ] {
            let (folder, result) = try_unpack(&tar_of(&entries), Limits::default());
            assert!(matches!(result, Err(PackageError::Entry { .. })), "{case}: {result:?}");
            assert!(!folder.path().join("evil").exists(), "{case}");
        }
    }

    #[test]
    fn too_much_is_refused() {
        let small = Limits { unpacked_bytes: 10, entries: 3 };
        let many = tar_of(&[("a", FILE, ""), ("b", FILE, ""), ("c", FILE, ""), ("d", FILE, "")]);
        assert!(matches!(try_unpack(&many, small).1, Err(PackageError::TooLarge { what: "entries", .. })));
        let large = tar_of(&[("a", FILE, "0123456789x")]);
        assert!(matches!(try_unpack(&large, small).1, Err(PackageError::TooLarge { what: "bytes", .. })));
        let zeros = "\0".repeat(32 << 20);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(&tar_of(&[("a", FILE, &zeros)])).expect("written");
        let bomb = gzip.finish().expect("done");
        assert!(matches!(try_unpack(&bomb, Limits::default()).1, Err(PackageError::Bomb)));
    }

    #[test]
    fn damaged_archives_are_refused_whatever_is_cut_off() {
        let tar = tar_of(&[("manifest.yaml", FILE, "name: x"), ("b", FILE, &"y".repeat(2000))]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).expect("written");
        let gzip = gzip.finish().expect("done");
        for length in [0, 1, 2, 20, gzip.len() / 2, gzip.len() - 9] {
            assert!(try_unpack(&gzip[..length], Limits::default()).1.is_err(), "{length}");
        }
        for bad in [&b""[..], b"PK\x03\x04rubbish", b"BZhrubbish", b"name: x\ncommand: y\n", &[0; 600]] {
            assert!(try_unpack(bad, Limits::default()).1.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_packed_folder_is_unpacked_to_the_same_files_and_links() {
        let [from, to] = [(), ()].map(|()| tempfile::tempdir().expect("a folder"));
        fs::create_dir(from.path().join("bin")).expect("made");
        fs::write(from.path().join("bin/run"), "program").expect("written");
        fs::set_permissions(from.path().join("bin/run"), fs::Permissions::from_mode(0o755)).expect("set");
        fs::write(from.path().join("manifest.yaml"), "name: one").expect("written");
        std::os::unix::fs::symlink("bin/run", from.path().join("link")).expect("linked");
        let mut archive = tempfile::tempfile().expect("a file");
        pack(from.path(), &mut archive).expect("packed");
        unpack(&mut archive, to.path(), Limits::default()).expect("unpacked");
        assert_eq!(fs::read_to_string(to.path().join("bin/run")).expect("read"), "program");
        assert_eq!(fs::read_to_string(to.path().join("manifest.yaml")).expect("read"), "name: one");
        assert_eq!(fs::read_link(to.path().join("link")).expect("a link"), Path::new("bin/run"));
        let mode = fs::metadata(to.path().join("bin/run")).expect("there").permissions().mode();
        assert_eq!(mode & 0o111, 0o111, "a program stays one");
    }
}
