// The processes of an instance, found from outside: the keeper of the instance is the process whose command line names
// the instance's folder, and everything below it belongs to it.

import { readFileSync, readdirSync } from "node:fs";

const read = (pid, file) => {
  try {
    return readFileSync(`/proc/${pid}/${file}`, "utf8");
  } catch {
    return undefined; // It ended meanwhile.
  }
};

/** Pid, parent, name and spent CPU time of all processes. Ticks are hundredths of a second everywhere on Linux. */
export function table() {
  const found = [];
  for (const entry of readdirSync("/proc")) {
    if (!/^\d+$/.test(entry)) continue;
    const stat = read(entry, "stat");
    if (!stat) continue;
    // The name may hold anything, closing brackets included.
    const end = stat.lastIndexOf(")");
    const fields = stat.slice(end + 2).split(" ");
    found.push({
      pid: Number(entry),
      name: stat.slice(stat.indexOf("(") + 1, end),
      parent: Number(fields[1]),
      cpuSeconds: (Number(fields[11]) + Number(fields[12])) / 100,
    });
  }
  return found;
}

/** The processes of an instance; `application` is the name of the program whose processes are left out. */
export function ofInstance(id, application) {
  const all = table();
  const roots = all.filter(({ pid }) => (read(pid, "cmdline") ?? "").split("\0").some((word) => word.endsWith(`/${id}`) || word.includes(`/${id}/`)));
  const members = new Map();
  const add = (one) => {
    if (members.has(one.pid)) return;
    members.set(one.pid, one);
    for (const child of all) if (child.parent === one.pid) add(child);
  };
  roots.forEach(add);
  if (members.size === 0) throw new Error(`no process of instance ${id} was found`);
  return [...members.values()].filter(({ name }) => name !== application.slice(0, 15));
}

const megabytes = (text, key) => Number(new RegExp(`^${key}:\\s+(\\d+) kB`, "m").exec(text ?? "")?.[1] ?? 0) / 1024;

/** Memory of a process: what is in RAM, and its share of it where pages are shared, both in MB. */
export const memory = (pid) => ({ rss: megabytes(read(pid, "status"), "VmRSS"), pss: megabytes(read(pid, "smaps_rollup"), "Pss") });
