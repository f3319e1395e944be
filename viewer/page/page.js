// The study list: searched as one types, paged by cursor, worked by keyboard.
// Whatever comes from a data set is written with textContent, isolated by <bdi>.

export const TEXTS = {
  zh: {
    title: "检查列表", skip: "跳到检查列表", aet: "AE 标题", port: "端口",
    figures: "存档与接收", studies: "检查", series: "序列", images: "图像", size: "容量",
    minute: "近 1 分钟", hour: "近 1 小时", day: "近 24 小时",
    spark: "近 60 分钟每分钟接收的图像，最多 {n} 幅",
    search: "查找检查", text: "姓名、拼音、患者号或检查号", period: "检查日期",
    all: "全部日期", today: "今天", week: "近 7 天", month: "近 30 天",
    modality: "检查类型", fields: "更多条件", clear: "清除条件",
    name: "姓名", patientId: "患者号", accession: "检查号", from: "日期从", to: "到",
    fresh: "有新的图像到达，刷新", keySearch: "查找", keyMove: "移动", keyOpen: "打开",
    patient: "患者", ids: "患者号 / 检查号", description: "检查描述", date: "检查日期",
    updated: "最近接收", more: "显示更多", zone: "接收时间为北京时间",
    unnamed: "（无姓名）", undated: "无日期", undescribed: "无描述",
    male: "男", female: "女", other: "其他", years: "{n} 岁", months: "{n} 个月", days: "{n} 天",
    loading: "正在读取…", shown: "{n} 个检查", shownOne: "{n} 个检查", shownMore: "已显示 {n} 个检查，还有更多",
    emptyTitle: "还没有检查", emptyText: "把第一个检查发到本节点，它会在这里出现：",
    noMatchTitle: "没有符合条件的检查", noMatchText: "换个写法，或放宽日期和类型。",
    errorTitle: "列表读取失败", errorNetwork: "连接不上服务器。请检查网络后重试。",
    errorServer: "服务器暂时不能回答（{n}）。", errorInput: "条件的写法不对，请修改后再试。",
    retry: "重试", logout: "退出登录", loggedIn: "当前账号", guest: "{n} 的链接",
    barredTitle: "此账号不查看患者检查", barredText: "管理工作与患者资料分开。要查看检查，请用有阅片权限的账号登录。",
    preview: "检查缩略图", noPreview: "没有缩略图", previewError: "缩略图读取失败。",
    studyUid: "检查 UID", copy: "复制", copied: "已复制", download: "下载 DICOM（multipart）", getscu: "复制 getscu 命令",
    metadata: "元数据 JSON", number: "序号", part: "部位", seriesDescription: "序列描述",
    noSeries: "没有序列", seriesError: "序列读取失败。", open: "打开", close: "收起",
  },
  en: {
    title: "Studies", skip: "Skip to the studies", aet: "AE title", port: "Port",
    figures: "Archive and arrivals", studies: "Studies", series: "Series", images: "Images", size: "Size",
    minute: "Last minute", hour: "Last hour", day: "Last 24 hours",
    spark: "Images received in each of the last 60 minutes, at most {n}",
    search: "Find studies", text: "Name, pinyin, ID, accession", period: "Study date",
    all: "All dates", today: "Today", week: "7 days", month: "30 days",
    modality: "Modality", fields: "More fields", clear: "Clear search",
    name: "Name", patientId: "Patient ID", accession: "Accession number", from: "From", to: "To",
    fresh: "New images have arrived: refresh", keySearch: "find", keyMove: "move", keyOpen: "open",
    patient: "Patient", ids: "Patient ID / accession", description: "Description", date: "Study date",
    updated: "Received", more: "Show more", zone: "Times of receipt are Beijing time",
    unnamed: "(no name)", undated: "No date", undescribed: "No description",
    male: "M", female: "F", other: "Other", years: "{n} y", months: "{n} mo", days: "{n} d",
    loading: "Loading…", shown: "{n} studies", shownOne: "{n} study", shownMore: "{n} studies shown, there are more",
    emptyTitle: "No studies yet", emptyText: "Send the first study to this node and it appears here:",
    noMatchTitle: "No study matches", noMatchText: "Try another spelling, or widen dates and modalities.",
    errorTitle: "The list could not be read", errorNetwork: "The server cannot be reached. Check the network and try again.",
    errorServer: "The server cannot answer at the moment ({n}).", errorInput: "A search field has the wrong form.",
    retry: "Try again", logout: "Log out", loggedIn: "Logged in as", guest: "Link of {n}",
    barredTitle: "This account does not see patients' studies", barredText: "Administration is kept apart from patient data. To see studies, log in with an account that reads images.",
    preview: "Thumbnail of the study", noPreview: "No thumbnail", previewError: "The thumbnail could not be read.",
    studyUid: "Study UID", copy: "Copy", copied: "Copied", download: "Download DICOM (multipart)", getscu: "Copy getscu command",
    metadata: "Metadata JSON", number: "No.", part: "Body part", seriesDescription: "Series description",
    noSeries: "No series", seriesError: "The series could not be read.", open: "Open", close: "Close",
  },
};

const MODALITIES = ["CT", "MR", "DX", "CR", "US", "MG", "XA", "NM", "PT", "ES"];
const MAX_YEARS = 130;
const PAGE_SIZE = 50;
// Pages that load by themselves; from then on the button asks.
const AUTOMATIC_PAGES = 10;
// How near the end the next page is asked for.
const NEAR_PX = 300;
const TYPING_MS = 180;
const POLL_MS = 5000;
const REQUEST_MS = 30000;
// Every instance of a study as it was stored (PS3.18 10.4.1.1.1).
const MULTIPART = 'multipart/related; type="application/dicom"; transfer-syntax=*';
const SVG = "http://www.w3.org/2000/svg";

const $ = (id) => document.getElementById(id);
const node = document.documentElement.dataset;

// -- language

const stored = {
  get() {
    try { return localStorage.getItem("huying.language"); } catch { return null; }
  },
  set(value) {
    try { localStorage.setItem("huying.language", value); } catch { /* not allowed: for now only */ }
  },
};

// What the address says, or was chosen before; else the browser's first that we have.
function chosenLanguage() {
  const known = () => navigator.languages.find((one) => /^(zh|en)\b/i.test(one));
  const asked = new URLSearchParams(location.search).get("lang") ?? stored.get() ?? known() ?? "zh";
  return asked.toLowerCase().startsWith("en") ? "en" : "zh";
}

let language = chosenLanguage();
const locale = () => (language === "zh" ? "zh-CN" : "en-GB");

function t(key, n) {
  const text = TEXTS[language][key];
  return n === undefined ? text : text.replace("{n}", n);
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = `${t("title")} · 互影 Huying`;
  for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll("[data-t-label]")) one.setAttribute("aria-label", t(one.dataset.tLabel));
  for (const one of document.querySelectorAll("[data-t-placeholder]")) one.placeholder = t(one.dataset.tPlaceholder);
  const other = language === "zh" ? "en" : "zh-CN";
  $("language").lang = other;
  $("language").textContent = other === "en" ? "English" : "中文";
}

// -- values as people read them

// Characters that could turn a line around or break it are shown as what they are: wrong.
function clean(value) {
  return String(value ?? "")
    .replace(/[\r\n\t]+/g, " ")
    .replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd")
    .trim();
}

const number = (value) => new Intl.NumberFormat(locale()).format(value);

export function bytes(value) {
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  let rest = value;
  while (rest >= 999.5 && unit < units.length - 1) { rest /= 1024; unit += 1; }
  const digits = unit === 0 || rest >= 99.5 ? 0 : rest >= 9.95 ? 1 : 2;
  const text = new Intl.NumberFormat(locale(), { maximumFractionDigits: digits }).format(rest);
  return `${text} ${units[unit]}`;
}

const HAN = /\p{Script=Han}/u;

function group(text) {
  const parts = clean(text).split("^").map((part) => part.trim()).filter(Boolean);
  const [family = "", given = "", ...rest] = parts;
  return HAN.test(text) ? parts.join("") : [family, given, ...rest].filter(Boolean).join(" ");
}

// Patient's Name (PS3.5 6.2.1): alphabetic=ideographic=phonetic, components by "^".
export function names(value) {
  const [alphabetic = "", ideographic = "", phonetic = ""] = String(value ?? "").split("=").map(group);
  const order = language === "zh" ? [ideographic, alphabetic, phonetic] : [alphabetic, ideographic, phonetic];
  const [first = "", second = ""] = order.filter(Boolean);
  return { first, second: second === first ? "" : second };
}

export function day(value) {
  const found = /^(\d{4})(\d{2})(\d{2})$/.exec(value ?? "");
  return found ? `${found[1]}-${found[2]}-${found[3]}` : "";
}

export function timeOfDay(value) {
  const found = /^(\d{2})(\d{2})?/.exec(value ?? "");
  return found ? `${found[1]}:${found[2] ?? "00"}` : "";
}

function utc(value) {
  const text = day(value);
  return text ? Date.parse(`${text}T00:00:00Z`) : NaN;
}

// Age on the day of the study; infants in months and days.
export function age(born, examined) {
  const from = new Date(utc(born));
  const to = new Date(utc(examined));
  if (Number.isNaN(from.getTime()) || Number.isNaN(to.getTime()) || to < from) return "";
  let months = (to.getUTCFullYear() - from.getUTCFullYear()) * 12 + to.getUTCMonth() - from.getUTCMonth();
  if (to.getUTCDate() < from.getUTCDate()) months -= 1;
  // Made-up birth dates are no ages.
  if (months >= 12 * MAX_YEARS) return "";
  if (months >= 24) return t("years", Math.floor(months / 12));
  return months >= 1 ? t("months", months) : t("days", Math.round((to - from) / 86400000));
}

function sex(value) {
  return { M: t("male"), F: t("female"), O: t("other") }[value] ?? "";
}

function beijing(date) {
  const parts = new Intl.DateTimeFormat("en-CA", {
    timeZone: "Asia/Shanghai", year: "numeric", month: "2-digit", day: "2-digit",
    hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
  }).formatToParts(date);
  const one = Object.fromEntries(parts.map((part) => [part.type, part.value]));
  return { day: `${one.year}-${one.month}-${one.day}`, time: `${one.hour}:${one.minute}`, second: one.second };
}

function received(us) {
  const then = beijing(new Date(us / 1000));
  const today = beijing(new Date()).day;
  const full = `${then.day} ${then.time}:${then.second}`;
  if (then.day === today) return { text: then.time, full };
  if (then.day.slice(0, 4) === today.slice(0, 4)) return { text: `${then.day.slice(5)} ${then.time}`, full };
  return { text: then.day, full };
}

// -- elements

function element(tag, { className, text, title, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (title) made.title = title;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A line of text from a data set: isolated, cut with an ellipsis, whole in its title.
function line(value, className = "", instead = "") {
  const text = clean(value);
  if (!text) return element("span", { className: `line none ${className}`, text: instead });
  return element("span", { className: `line ${className}`, title: text }, element("bdi", { text }));
}

function cell(className, ...children) {
  return element("td", { className, role: "cell" }, ...children);
}

function numberCell(className, key, text, title) {
  return element("td", { className: `c-number ${className}`, role: "cell", "data-label": t(key), text, title });
}

async function copy(text, button, label) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure context there is only the old way.
    const area = element("textarea", { className: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = t("copied");
  setTimeout(() => { button.textContent = t(label); }, 1500);
}

function copyButton(text, label = "copy") {
  const button = element("button", { type: "button", className: "quiet", text: t(label), "aria-live": "polite" });
  button.addEventListener("click", () => copy(text, button, label));
  return button;
}

// Where DCMTK's tools find this node; an AE title may hold what a shell would take apart.
function dicomAddress() {
  const host = location.hostname.replace(/^\[|\]$/g, "");
  const called = /^[\w.-]+$/.test(node.aet) ? node.aet : `'${node.aet.replace(/'/g, String.raw`'\''`)}'`;
  return `-aec ${called} ${host} ${node.dimsePort}`;
}

// -- asking the server

class Refused extends Error {
  constructor(status) {
    super(`HTTP ${status}`);
    this.status = status;
  }
}

// Ask for something and read it. What is asked `inBackground` keeps no session alive:
// the screen of somebody who went away is logged out.
async function read(url, accept, reading, { control = new AbortController(), inBackground = false } = {}) {
  const timer = setTimeout(() => control.abort(), REQUEST_MS);
  const headers = { Accept: accept, ...(inBackground && { "X-Background": "1" }) };
  try {
    const response = await fetch(url, { headers, signal: control.signal });
    if (response.status === 401) return await leave("/login?ended");
    if (!response.ok) throw new Refused(response.status);
    return await reading(response);
  } finally {
    clearTimeout(timer);
  }
}

function ask(url, accept, options) {
  return read(url, accept, (response) => (response.status === 204 ? null : response.json()), options);
}

// Go to another page; until it is there, nobody waits for an answer in vain.
function leave(url) {
  $("list").hidden = true;
  location.replace(url);
  return new Promise(() => {});
}

function explain(error) {
  if (!(error instanceof Refused)) return t("errorNetwork");
  if (error.status === 400) return t("errorInput");
  return t("errorServer", error.status);
}

const isBarred = (error) => error instanceof Refused && error.status === 403;

// -- who is there

const session = { me: null };

// Where nobody could say who asks, the answers themselves will tell what is allowed.
const may = (action) => session.me?.may?.includes(action) ?? true;

// On an open node there is nobody to log out.
const isLoggedIn = () => ["login", "ticket"].includes(session.me?.kind);

async function meet() {
  try {
    session.me = await ask("/api/v1/me", "application/json");
  } catch {
    // The list tells of trouble.
  }
  paintSession();
}

function paintSession() {
  $("account").hidden = !isLoggedIn();
  document.body.classList.toggle("known", isLoggedIn());
  if (!isLoggedIn()) return;
  const { kind, name } = session.me;
  const shown = clean(kind === "ticket" ? t("guest", name.replace(/^ticket:/, "")) : name);
  $("account-name").textContent = shown;
  $("account-name").title = `${t("loggedIn")}: ${shown}`;
}

async function logOut() {
  $("logout").disabled = true;
  try {
    // Another tab may have renewed the session, and with it the token.
    await meet();
    const response = await fetch("/api/v1/logout", { method: "POST", headers: { "X-CSRF-Token": session.me?.csrf ?? "" } });
    if (!response.ok && response.status !== 401) throw new Refused(response.status);
    await leave("/login");
  } catch (error) {
    $("status").textContent = explain(error);
    $("logout").disabled = false;
  }
}

// -- what is searched

const fields = { text: "text", name: "name", patient_id: "patient-id", accession: "accession", from: "from", to: "to" };
const chosen = new Set();

function wanted() {
  const query = new URLSearchParams();
  for (const [name, id] of Object.entries(fields)) {
    const value = $(id).value.trim();
    if (value) query.set(name, value);
  }
  if (chosen.size) query.set("modality", [...chosen].join(","));
  return query;
}

// -- the list

const list = { studies: [], cursor: "", pages: 0, loading: null, error: null, isBarred: false, open: "", seen: null };

async function load({ append = false } = {}) {
  list.loading?.abort();
  const mine = new AbortController();
  list.loading = mine;
  const query = wanted();
  $("clear").hidden = !query.toString();
  query.set("limit", PAGE_SIZE);
  if (append) query.set("cursor", list.cursor);
  paintBusy(append);
  try {
    const found = await ask(`/api/v1/study-list?${query}`, "application/json", { control: mine });
    if (list.loading !== mine) return;
    list.studies = append ? list.studies.concat(found.studies) : found.studies;
    list.cursor = found.cursor;
    list.pages = append ? list.pages + 1 : 1;
    list.error = null;
    if (!append) {
      list.open = "";
      list.seen = null;
      $("fresh").hidden = true;
    }
    list.loading = null;
    paint(append ? found.studies : null);
  } catch (error) {
    if (list.loading !== mine) return;
    list.loading = null;
    if (isBarred(error)) {
      bar();
      return;
    }
    list.error = error;
    list.failedAppend = append;
    paint(append ? [] : null);
  }
}

// Whoever may not see studies is told so, and is not offered to search for any.
function bar() {
  Object.assign(list, { isBarred: true, studies: [], cursor: "", error: null });
  $("search").hidden = true;
  document.querySelector(".above").hidden = true;
  paint();
}

function paintBusy(append) {
  $("list").setAttribute("aria-busy", "true");
  $("status").textContent = t("loading");
  $("more").hidden = true;
  if (append) return;
  $("state").hidden = true;
  document.querySelector("#list > table").hidden = false;
  if (list.studies.length) $("list").classList.add("busy");
  else $("rows").replaceChildren(...Array.from({ length: 8 }, ghost));
}

function ghost(_, i) {
  const bone = (extra) => element("span", { className: `bone ${extra}` });
  const row = element("tr", { className: "ghost", "aria-hidden": "true" });
  for (let column = 0; column < 9; column += 1) {
    const children = [bone(column < 3 ? (i % 2 ? "half" : "") : "half")];
    if (column < 2) children.push(bone("short"));
    row.append(element("td", { className: ["c-patient", "c-ids", "c-description"][column] ?? "" }, ...children));
  }
  return row;
}

// Write the rows; only `added` when a page was appended.
function paint(added = null) {
  $("list").removeAttribute("aria-busy");
  $("list").classList.remove("busy");
  const failed = list.error && !list.failedAppend;
  if (failed) list.studies = [];
  if (added) $("rows").append(...added.map(row));
  else $("rows").replaceChildren(...list.studies.map(row));
  document.querySelector("#list > table").hidden = list.studies.length === 0;
  $("state").hidden = list.studies.length > 0 && !list.error;
  $("state").replaceChildren();
  $("state").classList.toggle("bad", Boolean(list.error));
  const count = number(list.studies.length);
  if (list.isBarred) paintBarred();
  else if (list.error) paintError();
  else if (!list.studies.length) paintEmpty();
  else $("status").textContent = t(list.cursor ? "shownMore" : list.studies.length === 1 ? "shownOne" : "shown", count);
  $("more").hidden = !list.cursor || Boolean(list.error);
  continueAtEnd();
}

function paintError() {
  $("status").textContent = "";
  const retry = element("button", { type: "button", className: "retry", text: t("retry") });
  const again = list.failedAppend;
  retry.addEventListener("click", () => load({ append: again }));
  $("state").append(element("h2", { text: t("errorTitle") }), element("p", { text: explain(list.error) }), retry);
}

function paintBarred() {
  $("state").append(element("h2", { text: t("barredTitle") }), element("p", { text: t("barredText") }));
}

function paintEmpty() {
  $("status").textContent = "";
  if (wanted().toString()) {
    $("state").append(element("h2", { text: t("noMatchTitle") }), element("p", { text: t("noMatchText") }));
    return;
  }
  // Unlike storescu with its defaults, dcmsend sends compressed images as they are.
  const command = `dcmsend ${dicomAddress()} +sd +r ./dicom`;
  $("state").append(
    element("h2", { text: t("emptyTitle") }),
    element("p", { text: t("emptyText") }),
    element("div", { className: "command" }, element("code", { text: command }), copyButton(command)),
  );
}

function row(study) {
  const { first, second } = names(study.patient_name);
  const details = [second, sex(study.sex), age(study.birth_date, study.study_date)].filter(Boolean);
  const opener = element(
    "button",
    { type: "button", className: "opener", "aria-expanded": "false", title: clean(study.patient_name) },
    element("bdi", { text: first || t("unnamed") }),
  );
  const about = element("span", { className: "line sub" });
  details.forEach((text, i) => about.append(i ? " · " : "", element("bdi", { text })));
  const tags = element("span", { className: "tags" });
  for (const one of study.modalities.slice(0, 6)) tags.append(element("span", { className: "tag", text: clean(one) }));
  const when = received(study.updated_us);
  const made = element(
    "tr",
    { className: "study", role: "row" },
    cell("c-patient", opener, about),
    cell("c-ids", line(study.patient_id, "mono"), line(study.accession_number, "mono sub")),
    cell("c-description", line(study.study_description, "", t("undescribed"))),
    cell("c-modality", tags),
    cell("c-date", line(day(study.study_date), "", t("undated")), line(timeOfDay(study.study_time), "sub")),
    numberCell("c-series", "series", number(study.n_series)),
    numberCell("c-images", "images", number(study.n_instances)),
    numberCell("c-size", "size", bytes(study.size_bytes)),
    numberCell("c-updated", "updated", when.text, when.full),
  );
  opener.addEventListener("click", (event) => { event.stopPropagation(); toggle(made, study); });
  made.addEventListener("click", () => {
    // Marking text to copy it is no click.
    if (!String(getSelection())) toggle(made, study);
  });
  return made;
}

// -- a study's detail

function shut() {
  const open = document.querySelector(".study.open");
  open?.classList.remove("open");
  open?.querySelector(".opener").setAttribute("aria-expanded", "false");
  document.querySelector(".detail")?.remove();
  list.open = "";
  dropPreview();
}

function toggle(made, study) {
  const wasOpen = made.classList.contains("open");
  shut();
  if (wasOpen) return;
  list.open = study.study_instance_uid;
  made.classList.add("open");
  made.querySelector(".opener").setAttribute("aria-expanded", "true");
  const panel = element("div", { className: "panel" });
  const detail = element("tr", { className: "detail", role: "row" }, element("td", { colspan: "9", role: "cell" }, panel));
  made.after(detail);
  paintDetail(panel, study);
}

function paintDetail(panel, study) {
  const uid = study.study_instance_uid;
  const base = `/dicom-web/studies/${encodeURIComponent(uid)}`;
  const link = (href, text, saved) => element("a", { className: "quiet", href, text, download: saved });
  panel.replaceChildren(
    element(
      "div",
      { className: "head" },
      element(
        "div",
        { className: "uid" },
        element("span", { text: t("studyUid") }),
        element("bdi", { className: "mono", text: uid }),
        copyButton(uid),
      ),
      copyButton(`getscu -S ${dicomAddress()} -k 0008,0052=STUDY -k 0020,000d=${uid}`, "getscu"),
      link(`${base}?accept=${encodeURIComponent(MULTIPART)}`, t("download"), `${uid}.multipart`),
      link(`${base}/metadata?accept=${encodeURIComponent("application/dicom+json")}`, t("metadata"), `${uid}.json`),
    ),
    element(
      "div",
      { className: "body" },
      element("div", { className: "preview" }),
      element("div", { className: "series" }, element("p", { className: "note", text: t("loading"), role: "status" })),
    ),
  );
  loadPreview(panel.querySelector(".preview"), base);
  loadSeries(panel, base);
}

// The small picture of the study that is open, and its request.
const preview = { control: null, address: "" };

function dropPreview() {
  preview.control?.abort();
  preview.control = null;
  if (preview.address) URL.revokeObjectURL(preview.address);
  preview.address = "";
}

// It is asked for when a study is opened, not for every line of the list.
async function loadPreview(frame, base) {
  dropPreview();
  const control = new AbortController();
  preview.control = control;
  frame.setAttribute("aria-busy", "true");
  frame.replaceChildren(element("span", { className: "bone" }));
  try {
    const picture = await read(`${base}/thumbnail`, "image/jpeg, image/png", (response) => response.blob(), { control });
    if (preview.control !== control) return;
    preview.address = URL.createObjectURL(picture);
    const image = element("img", { src: preview.address, alt: t("preview") });
    await image.decode();
    if (preview.control === control) frame.replaceChildren(image);
  } catch (error) {
    if (preview.control !== control) return;
    // Reports and the like have no picture: that is no failure.
    const isNone = error instanceof Refused && error.status < 500 && error.status !== 429;
    frame.replaceChildren(element("span", { text: t(isNone ? "noPreview" : "previewError") }));
    if (isNone) return;
    const retry = element("button", { type: "button", className: "quiet", text: t("retry") });
    retry.addEventListener("click", () => loadPreview(frame, base));
    frame.append(retry);
  } finally {
    if (preview.control === control) frame.removeAttribute("aria-busy");
  }
}

async function loadSeries(panel, base) {
  const note = panel.querySelector(".note");
  try {
    const query = "includefield=0008103E&includefield=00180015&includefield=00201209&limit=1000";
    const found = (await ask(`${base}/series?${query}`, "application/dicom+json")) ?? [];
    const rows = found.map(series).sort((a, b) => a.number - b.number);
    if (rows.length) note.replaceWith(seriesTable(rows));
    else note.textContent = t("noSeries");
  } catch (error) {
    note.classList.add("bad");
    note.textContent = `${t("seriesError")}${explain(error)} `;
    const retry = element("button", { type: "button", className: "quiet", text: t("retry") });
    retry.addEventListener("click", () => {
      note.classList.remove("bad");
      note.textContent = t("loading");
      loadSeries(panel, base);
    });
    note.append(retry);
  }
}

// A series of a QIDO answer (PS3.18 Annex F).
function series(found) {
  const value = (tag) => found[tag]?.Value?.[0];
  return {
    number: Number(value("00200011") ?? Infinity),
    modality: value("00080060"),
    description: value("0008103E"),
    part: value("00180015"),
    images: Number(value("00201209") ?? 0),
  };
}

function seriesTable(rows) {
  const head = [["s-number", "number"], ["s-modality", "modality"], ["s-description", "seriesDescription"], ["s-part", "part"], ["s-images", "images"]];
  const body = rows.map((one) => element(
    "tr",
    {},
    element("td", { className: "s-number", text: Number.isFinite(one.number) ? String(one.number) : "–" }),
    element("td", { className: "s-modality" }, element("span", { className: "tag", text: clean(one.modality) || "–" })),
    element("td", { className: "s-description" }, line(one.description, "", t("undescribed"))),
    element("td", { className: "s-part" }, line(one.part, "", "–")),
    element("td", { className: "s-images", text: number(one.images) }),
  ));
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...head.map(([className, key]) => element("th", { className, scope: "col", text: t(key) })))),
    element("tbody", {}, ...body),
  );
}

// -- figures

const figures = { last: null, isBarred: false };

function paintFigures() {
  if (!figures.last) return;
  const { totals, recent } = figures.last;
  $("n-studies").textContent = number(totals.studies);
  $("n-series").textContent = number(totals.series);
  $("n-instances").textContent = number(totals.instances);
  $("n-bytes").textContent = bytes(totals.size_bytes);
  for (const span of ["minute", "hour", "day"]) {
    const amount = recent[span];
    const shown = [number(amount.instances)];
    if (amount.instances) shown.push(element("span", { text: ` ${bytes(amount.size_bytes)}` }));
    $(`in-${span}`).replaceChildren(...shown);
  }
  const most = Math.max(...recent.per_minute);
  const step = 240 / recent.per_minute.length;
  $("spark").setAttribute("aria-label", t("spark", number(most)));
  $("spark").replaceChildren(...recent.per_minute.map((count, i) => {
    const bar = document.createElementNS(SVG, "rect");
    const height = count ? Math.max(3, (count / most) * 38) : 1.5;
    for (const [name, value] of Object.entries({ x: i * step, y: 40 - height, width: step * 0.72, height })) {
      bar.setAttribute(name, value.toFixed(2));
    }
    if (count) bar.setAttribute("class", "some");
    return bar;
  }));
}

async function poll() {
  if (document.visibilityState === "visible") await look();
  setTimeout(poll, POLL_MS);
}

// Look for news, and whether the session lives: this page leaves when it does not.
async function look() {
  figures.isBarred ||= !may("measure");
  $("figures").hidden = figures.isBarred;
  try {
    if (figures.isBarred) {
      if (isLoggedIn()) await ask("/api/v1/me", "application/json", { inBackground: true });
      return;
    }
    figures.last = await ask("/api/v1/activity", "application/json", { inBackground: true });
    paintFigures();
    noticeArrivals(figures.last.totals);
  } catch (error) {
    // Else the figures stay as they are; the list tells of trouble.
    figures.isBarred ||= isBarred(error);
    $("figures").hidden = figures.isBarred;
  }
}

function noticeArrivals(totals) {
  if (list.loading || list.error || list.isBarred) return;
  if (!list.studies.length && !wanted().toString()) {
    if (totals.studies) load();
    return;
  }
  list.seen = list.seen ?? totals.instances;
  $("fresh").hidden = totals.instances === list.seen;
}

// -- the controls

let typing = 0;
function search(delay = 0) {
  clearTimeout(typing);
  typing = setTimeout(load, delay);
}

function pressPeriod() {
  const from = $("from").value;
  const to = $("to").value;
  for (const one of $("periods").children) {
    const days = one.dataset.days;
    const mine = days === "" ? !from && !to : from === daysAgo(days) && !to;
    one.setAttribute("aria-pressed", String(mine));
  }
}

function daysAgo(days) {
  return beijing(new Date(Date.now() - days * 86400000)).day;
}

for (const one of MODALITIES) {
  const button = element("button", { type: "button", text: one, "aria-pressed": "false" });
  button.addEventListener("click", () => {
    if (!chosen.delete(one)) chosen.add(one);
    button.setAttribute("aria-pressed", String(chosen.has(one)));
    search();
  });
  $("modalities").append(button);
}

$("periods").addEventListener("click", (event) => {
  const days = event.target.closest("button")?.dataset.days;
  if (days === undefined) return;
  $("from").value = days === "" ? "" : daysAgo(days);
  $("to").value = "";
  pressPeriod();
  search();
});

for (const id of Object.values(fields)) {
  // Half a word in an input method is not yet a search.
  $(id).addEventListener("input", (event) => { if (!event.isComposing) search(TYPING_MS); });
  $(id).addEventListener("compositionend", () => search(TYPING_MS));
}
for (const id of ["from", "to"]) $(id).addEventListener("input", pressPeriod);

$("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("more-fields").addEventListener("click", () => {
  const open = $("fields").hidden;
  $("fields").hidden = !open;
  $("more-fields").setAttribute("aria-expanded", String(open));
  if (open) $("name").focus();
});
$("clear").addEventListener("click", () => {
  for (const id of Object.values(fields)) $(id).value = "";
  chosen.clear();
  for (const one of $("modalities").children) one.setAttribute("aria-pressed", "false");
  pressPeriod();
  $("text").focus();
  search();
});
$("fresh").addEventListener("click", () => load());
$("more").addEventListener("click", () => load({ append: true }));
$("logout").addEventListener("click", logOut);
document.addEventListener("visibilitychange", () => { if (document.visibilityState === "visible") look(); });
// A browser's "back" brings no patients back after one has logged out.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  stored.set(language);
  translate();
  paintSession();
  paintFigures();
  if (list.loading) return;
  const open = list.studies.findIndex((study) => study.study_instance_uid === list.open);
  paint();
  if (open >= 0) toggle($("rows").children[open], list.studies[open]);
});

// Load the next page when the end of this one is near.
function continueAtEnd() {
  if (list.loading || list.error || !list.cursor || list.pages >= AUTOMATIC_PAGES) return;
  if ($("foot").getBoundingClientRect().top < innerHeight + NEAR_PX) load({ append: true });
}

new IntersectionObserver(continueAtEnd, { rootMargin: `${NEAR_PX}px` }).observe($("foot"));

// -- the keyboard

// Move the focus between the studies; up from the first one goes back to the search.
function move(from, step) {
  const openers = [...document.querySelectorAll(".opener")];
  const at = openers.indexOf(from);
  if (at === 0 && step === -1) {
    $("text").focus();
    return;
  }
  openers[Math.max(0, Math.min(openers.length - 1, at + step))]?.focus();
}

const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  const focused = document.activeElement;
  if (event.key === "/" && !focused.matches("input, textarea")) {
    event.preventDefault();
    $("text").focus();
    $("text").select();
  } else if (event.key === "Escape" && list.open) {
    const opener = document.querySelector(".study.open .opener");
    shut();
    opener?.focus();
  } else if (event.key === "ArrowDown" && (focused === $("text") || focused === document.body)) {
    event.preventDefault();
    move(null, 1);
  } else if (focused.matches(".opener") && event.key in STEPS) {
    event.preventDefault();
    move(focused, STEPS[event.key]);
  }
});

async function begin() {
  paintBusy(false);
  await meet();
  if (may("find")) load();
  else bar();
  poll();
}

translate();
// A browser may bring back what was typed before.
pressPeriod();
begin();
