{{- define "recallq.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "recallq.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "recallq.labels" -}}
{{ include "recallq.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: {{ .Chart.Name }}
{{- end -}}

{{- define "recallq.fleet" -}}
{{- .Values.fleet | default .Release.Name -}}
{{- end -}}

{{- define "recallq.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "recallq.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Seconds for which a worker may have to be waited for. The defaults are RecallQ's, and 15 s is what
     it takes to see that Redis is away, and to close. */}}
{{- define "recallq.longestStop" -}}
{{- $job := index .Values.settings "RECALLQ_JOB_TIMEOUT" | default 30 | float64 -}}
{{- $slow := index .Values.settings "RECALLQ_SLOW_PATIENCE" | default 10 | float64 -}}
{{- addf $job $slow 15 | ceil | int -}}
{{- end -}}
